"""The page as it is served, and what its files hold: no server of a model is needed for either."""

import asyncio
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from httpx2 import ASGITransport, AsyncClient

from internlm2.serve.app import create_app
from internlm2.serve.page import WEB_FOLDER
from internlm2.serve.service import Service
from internlm2.serve.settings import ServeSettings

VENDOR = WEB_FOLDER / "vendor"
OWN = sorted(path for path in WEB_FOLDER.rglob("*") if path.is_file() and VENDOR not in path.parents)
MODULES = [path for path in OWN if path.suffix == ".js"]
MAX_BYTES = 1_500_000
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def get(page_llm):
    """Fetches a path from an application that asks for keys; the page must not need one."""
    app = create_app(Service.of(page_llm, ServeSettings(keys={"ann": b"x" * 32})))

    def fetch(path, **headers):
        async def go():
            async with AsyncClient(transport=ASGITransport(app), base_url="http://localhost") as client:
                return await client.get(path, headers=headers)

        return asyncio.run(go())

    return fetch


def test_the_page_may_run_nothing_but_its_own_files(get):
    for path in ("/", "/web/index.html", "/web/js/main.js", "/web/favicon.svg"):
        response = get(path)
        assert response.status_code == 200, path
        policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert policy["frame-ancestors"] == policy["object-src"] == policy["base-uri"] == "'none'"
        assert "unsafe" not in response.headers["content-security-policy"]
        assert set(policy["img-src"].split()) == {"'self'", "data:", "blob:"}
        assert not {"script-src", "style-src", "connect-src"} & set(policy)  # as default-src says
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/web/js/main.js", "text/javascript; charset=utf-8"),
        ("/web/css/base.css", "text/css; charset=utf-8"),
        ("/web/favicon.svg", "image/svg+xml"),
        ("/web/vendor/katex-0.19.1/katex.js", "text/javascript; charset=utf-8"),
        ("/web/vendor/katex-0.19.1/fonts/KaTeX_Main-Regular.woff2", "font/woff2"),
        ("/web/vendor/katex-0.19.1/LICENSE", "text/plain; charset=utf-8"),
        ("/web/vendor/NOTICE.md", "text/plain; charset=utf-8"),
    ],
)
def test_files_have_their_type_and_are_fetched_once(get, path, kind):
    response = get(path)
    assert (response.status_code, response.headers["content-type"]) == (200, kind)
    caching = response.headers["cache-control"]
    assert caching == ("public, max-age=31536000, immutable" if "katex" in path else "no-cache")
    again = get(path, **{"if-none-match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert "content-security-policy" in again.headers


@pytest.mark.parametrize(
    "path",
    [
        "/web/../page.py", "/web/..%2fpage.py", "/web/%2e%2e/page.py", "/web/js/..%2f..%2f..%2fpage.py", "/web/%2fetc/passwd",
        "/web/..%5cpage.py", "/web/....//page.py", "/web/js/%00main.js", "/web/js", "/web/", "/web/package.json", "/web/none.js",
        "/web/vendor/..%2f..%2fapp.py", "/web/~/x.js",
    ],
)  # fmt: skip
def test_nothing_beside_the_page_is_given_out(get, path):
    response = get(path)
    assert response.status_code in (401, 404)
    assert "def " not in response.text
    assert "root:" not in response.text


def test_links_do_not_lead_out(page_llm, tmp_path):
    (tmp_path / "index.html").write_text("x")
    (tmp_path / "out.js").symlink_to(Path(__file__))
    app = create_app(Service.of(page_llm, ServeSettings()), web_folder=tmp_path)

    async def go():
        async with AsyncClient(transport=ASGITransport(app), base_url="http://localhost") as client:
            return (await client.get("/")).status_code, (await client.get("/web/out.js")).status_code

    assert asyncio.run(go()) == (200, 404)


def test_vendored_files_are_those_that_are_listed():
    rows = re.findall(
        r"^\| (\S+) \| (\S+) \| (\S+) \| (\S+) \| ([0-9a-f]{64}) \|$",
        (VENDOR / "NOTICE.md").read_text(),
        re.M,
    )
    listed = {name: digest for name, *_, digest in rows}
    found = {
        path.relative_to(VENDOR).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in VENDOR.rglob("*")
        if path.is_file() and path.name != "NOTICE.md"
    }
    assert found == listed
    assert len(found) > 40
    for name, package, version, licence, _ in rows:
        folder = name.split("/")[0]
        assert folder.endswith(f"-{version}"), name
        text = (VENDOR / folder / "LICENSE").read_text()
        assert "Copyright" in text, package
        assert {"MIT": "MIT", "BSD-3-Clause": "BSD 3-Clause"}[
            licence
        ] in text or "Permission is hereby" in text


def test_the_page_is_small():
    assert sum(path.stat().st_size for path in WEB_FOLDER.rglob("*") if path.is_file()) < MAX_BYTES
    assert all(len(path.read_text().splitlines()) < 400 for path in OWN)


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.relative_to(WEB_FOLDER).as_posix())
def test_no_other_host_is_named_and_no_string_becomes_markup(path):
    text = path.read_text(encoding="utf-8")
    addresses = set(re.findall(r"(?:https?:)?//[\w-]+(?:\.[\w-]+)+[^\s\"')>]*", text))
    assert {address for address in addresses if not address.startswith("http://www.w3.org/")} == set()
    words = (
        "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "createContextualFragment", "setHTML",
        "eval(", "new Function", "srcdoc=", "javascript:", "@import",
    )  # fmt: skip
    assert [word for word in words if word in text] == []
    if path.suffix == ".html":
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=", text)
        assert not re.search(r"<script(?![^>]*\ssrc=)", text)
    if path.suffix == ".css":
        assert "url(" not in text


def test_vendored_styles_load_nothing_that_is_not_there():
    style = VENDOR / "katex-0.19.1" / "katex.css"
    addresses = re.findall(r"url\(([^)]+)\)", style.read_text())
    assert len(addresses) >= 20
    assert all((style.parent / address).is_file() for address in addresses)
    assert {path.name for path in (style.parent / "fonts").iterdir()} == {
        Path(address).name for address in addresses
    }


def test_every_import_is_there_and_loaded_beforehand():
    index = (WEB_FOLDER / "index.html").read_text(encoding="utf-8")
    preloads = set(re.findall(r'rel="modulepreload" href="web/([^"]+)"', index))
    wanted = {path.relative_to(WEB_FOLDER).as_posix() for path in MODULES if path.name != "early.js"}
    assert {each for each in preloads if each.startswith("js/")} == wanted
    for path in re.findall(r'(?:href|src)="(web/[^"]+)"', index):
        assert (WEB_FOLDER.parent / path).is_file(), path
    for module in MODULES:
        for target in re.findall(r'(?:from|import) ?\(?"(\.[^"]+)"', module.read_text(encoding="utf-8")):
            assert (module.parent / target).is_file(), f"{module.name}: {target}"


def test_every_button_of_the_page_has_a_name():
    index = (WEB_FOLDER / "index.html").read_text(encoding="utf-8")
    for tag, rest in re.findall(r"<(button|input|textarea)([^>]*)>", index):
        is_named = re.search(r'data-(?:tip|aria)="', rest) or 'id="language"' in rest
        followed = tag == "button" and re.search(re.escape(rest) + r">\s*<span data-t=", index)
        assert is_named or followed, rest


def test_both_languages_have_the_same_words():
    keys = {
        name: re.findall(
            r'^  (\w+): "(?:.+)",$', (WEB_FOLDER / "js/lang" / f"{name}.js").read_text("utf-8"), re.M
        )
        for name in ("en", "zh")
    }
    assert len(keys["en"]) > 90
    assert keys["en"] == keys["zh"]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
@pytest.mark.parametrize("name", ["test_text.js", "test_talk.js", "test_keep.js"])
def test_modules(name):
    command = ["node", "--test", "--test-reporter=tap", f"tests/web/js/{name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    failures = "\n".join(
        line for line in done.stdout.splitlines() if "ok " not in line or line.lstrip().startswith("not")
    )
    assert done.returncode == 0, failures[-8000:] + done.stderr[-2000:]
    assert int(re.findall(r"^# pass (\d+)", done.stdout, re.M)[-1]) > 10
