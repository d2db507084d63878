"""The web page at `/` and its files under `/web/`, with what tells a browser to run nothing else.

The policy forbids scripts and styles within the page, other hosts, frames, and every way from a string to markup
(Trusted Types): words of a model that slipped through the page's own care would still do nothing.
"""

from pathlib import Path, PurePosixPath

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import Scope

WEB_FOLDER = Path(__file__).parent / "web"
POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data: blob:",
        "object-src 'none'",
        "frame-src 'none'",
        "worker-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
    ".md": "text/plain; charset=utf-8",
    "": "text/plain; charset=utf-8",  # licences
}
_HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
# Folders of libraries have the version in their name; everything else is asked for again, by its ETag.
_LASTING = "public, max-age=31536000, immutable"
_CHECKED = "no-cache"


class WebFiles(StaticFiles):
    """Files of the page: their types do not depend on the machine, and other kinds are not given out."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """One file, or 304 where the browser has it."""
        parts = PurePosixPath(path.replace("\\", "/"))
        if parts.suffix not in _TYPES:
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        if response.status_code in (200, 206):
            response.headers["content-type"] = _TYPES[parts.suffix]
        response.headers.update(_HEADERS)
        is_lasting = parts.parts[0] == "vendor" and len(parts.parts) > 2
        response.headers["cache-control"] = _LASTING if is_lasting else _CHECKED
        return response


def add_page(app: FastAPI, folder: Path) -> None:
    """Serve the page of `folder`, when there is one."""
    if not (folder / "index.html").is_file():
        return
    files = WebFiles(directory=folder)
    app.mount("/web", files, name="web")

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)
