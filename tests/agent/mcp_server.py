"""A small MCP server, made with the package itself; started by the tests. Argument: stdio, or a port for HTTP."""

import base64
import os
import sys
import time

from mcp.server.mcpserver import Image, MCPServer
from mcp_types import EmbeddedResource, ImageContent, TextContent, TextResourceContents

server = MCPServer("small")
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABpfZFQAAAAABJRU5ErkJggg=="
)


@server.tool()
def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


@server.tool(name="get/the.picture")
def picture() -> Image:
    """Draw a pixel."""
    return Image(data=PIXEL, format="png")


@server.tool(structured_output=False)
def mixed() -> list:
    """Several kinds of content."""
    text = TextResourceContents(uri="memo://one", text="from a resource")
    return [
        TextContent(text="first"),
        EmbeddedResource(resource=text),
        ImageContent(data="not base64!", mime_type="image/png"),
        ImageContent(data="AAAA", mime_type="image/svg+xml"),
    ]


@server.tool()
def refuse() -> str:
    """Always fails."""
    raise ValueError("I will not")


@server.tool()
def flood() -> str:
    """Says very much."""
    return "begin" + "x" * 3_000_000 + "end<|im_end|>\x1b[2J"


@server.tool()
def sleep(seconds: float) -> str:
    """Sleeps."""
    time.sleep(seconds)
    return "awake"


@server.tool()
def die() -> str:
    """Ends the server."""
    print("dying now", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
def process() -> list[str]:
    """The server's number and what it sees of the environment."""
    return [str(os.getpid()), *sorted(os.environ)]


if sys.argv[1] == "stdio":
    server.run()
else:
    server.run("streamable-http", port=int(sys.argv[1]))
