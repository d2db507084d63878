"""Tools of MCP servers (Model Context Protocol), over standard input and output or streamable HTTP.

A server is asked once what it offers. When it dies, is slow or answers nonsense, the model reads an error, and the
next call connects anew. What it sends is text from outside, and is cut and cleaned as any tool's.
"""

import asyncio
import base64
import binascii
import json
import logging
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from internlm2.agent.background import BackgroundLoop
from internlm2.agent.text import clean
from internlm2.agent.tool_type import Arguments, Picture, Tool, ToolDefinitionError, ToolError, ToolResult
from internlm2.errors import InternLM2Error, MissingDependencyError

if TYPE_CHECKING:
    from mcp import Client
    from mcp_types import CallToolResult
    from mcp_types import Tool as Offered

MAX_TOOLS = 256
MAX_SCHEMA_CHARS = 64 << 10
MAX_DESCRIPTION_CHARS = 4096
_MAX_PAGES = 64
_PICTURE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
_LOG_CHARS = 2000
_PATIENCE_SECONDS = 5.0  # our own limit is to be met before the library's


class McpError(InternLM2Error):
    """A server that cannot be started or reached, or that offers what no tool can be made of."""


@dataclass(frozen=True)
class McpServer:
    """Where a server is. name: begins the names of its tools. command: starts it, for standard input and output; its
    environment is small unless `environment` adds to it. url: of streamable HTTP, with `headers`. One of both is given.
    """

    name: str
    command: Sequence[str] = ()
    url: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.command) == (self.url is not None):
            raise ToolDefinitionError(f"The server {self.name!r} needs a command or a URL, one of both.")

    @classmethod
    def parse(cls, text: str) -> "McpServer":
        """From the command line: `[NAME=]COMMAND ARGUMENTS` or `[NAME=]http://...`. Raises ToolDefinitionError."""
        found = re.match(r"([A-Za-z_][A-Za-z0-9_-]*)=(?=\S)", text)
        given, rest = (found[1], text[found.end() :]) if found else (None, text)
        if re.match(r"https?://", rest):
            return cls(given or _short(re.sub(r"^https?://|[/:].*$", "", rest)), url=rest)
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise ToolDefinitionError(f"--mcp {text!r}: {error}. Close the quotes.") from error
        if not words:
            raise ToolDefinitionError("--mcp needs a command, such as 'python my_server.py', or a URL.")
        scripts = [word for word in words if not word.startswith("-")]
        return cls(given or _short(scripts[-1].rstrip("/").rpartition("/")[2].partition(".")[0]), words)


class McpTools:
    """The tools of a server; use it in a `with` block, or call `close`. tools: what an agent takes.

    seconds: to connect, and of one call. Raises McpError when the server cannot be reached, MissingDependencyError
    without the package `mcp`.

    >>> with McpTools(McpServer("files", ["python", "server.py"])) as server:
    ...     Agent(model, server.tools).run("What is in my notes?")
    """

    def __init__(self, server: McpServer, *, seconds: float = 60.0) -> None:
        self._server = server
        self._seconds = seconds
        self._loop = BackgroundLoop(f"internlm2-mcp-{server.name}")
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        _client_class()
        try:
            offered = self._loop.run(self._list())
        except BaseException:
            self.close()
            raise
        self.tools = self._make(offered)

    def close(self) -> None:
        """End the connection, and the server's process. Safe to call twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                self._loop.run(connection.close())
            except (Exception, asyncio.CancelledError) as error:
                logging.getLogger("internlm2").debug("Closing %s: %r", self._server.name, error)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _connected(self) -> "_Connection":
        """The connection, made anew where it is gone. A caller that gives up does not break off the making."""
        work = asyncio.ensure_future(self._connect())
        work.add_done_callback(_look_at_error)
        return await asyncio.shield(work)

    async def _connect(self) -> "_Connection":
        async with self._connecting:
            if self._connection is None or not self._connection.is_open:
                if self._connection is not None:
                    await self._connection.close()
                self._connection = _Connection(self._server, self._seconds)
                await self._connection.open()
            return self._connection

    async def _list(self) -> "list[Offered]":
        connection = await self._connected()
        found: list[Offered] = []
        cursor: str | None = None
        try:
            for _ in range(_MAX_PAGES):
                async with asyncio.timeout(self._seconds):
                    page = await connection.client.list_tools(cursor=cursor)
                found += page.tools
                cursor = page.next_cursor
                if cursor is None or len(found) > MAX_TOOLS:
                    break
        except Exception as error:
            raise McpError(
                f"{self._server.name} does not say what it offers: {connection.told(error)}"
            ) from error
        if len(found) > MAX_TOOLS:
            raise McpError(
                f"{self._server.name} offers more than {MAX_TOOLS} tools, which no model can read."
            )
        return found

    def _make(self, offered: "Sequence[Offered]") -> list[Tool]:
        tools: dict[str, Tool] = {}
        for each in offered:
            schema = {**each.input_schema, "type": "object"}
            if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
                raise McpError(
                    f"{self._server.name}: the schema of {each.name!r:.80} is longer than any model reads."
                )
            name = _short(f"{self._server.name}_{each.name}")
            if name in tools:
                raise McpError(f"{self._server.name} has two tools that are called {name!r} here.")
            words = clean((each.description or each.title or "")[:MAX_DESCRIPTION_CHARS])
            tools[name] = Tool(name, words, schema, self._caller(each.name))
        return list(tools.values())

    def _caller(self, name: str):
        async def run(arguments: Arguments) -> ToolResult:
            # The connection lives in its own loop; a caller that gives up cancels the call there.
            return await asyncio.wrap_future(self._loop.submit(self._call(name, dict(arguments))))

        return run

    async def _call(self, name: str, arguments: dict[str, object]) -> ToolResult:
        try:
            connection = await self._connected()
        except McpError as error:
            raise ToolError(str(error)) from error
        try:
            async with asyncio.timeout(self._seconds):
                return _read(await connection.call(name, arguments))
        except TimeoutError:
            raise ToolError(f"{self._server.name} gave no result within {self._seconds:g} s.") from None
        except Exception as error:
            raise ToolError(f"{self._server.name}: {connection.told(error)}") from error


class _Connection:
    """One life of a server. It is opened and closed within one task, as its library demands."""

    def __init__(self, server: McpServer, seconds: float) -> None:
        self._server = server
        self._seconds = seconds
        self._task: asyncio.Task[None] | None = None
        self._leave = asyncio.Event()
        self._opened: asyncio.Future[Client] | None = None
        self._log: IO[str] | None = None
        self.client: Client

    @property
    def is_open(self) -> bool:
        """Whether calls can be sent."""
        return self._task is not None and not self._task.done() and not self._leave.is_set()

    async def open(self) -> None:
        """Connect. Raises McpError."""
        self._opened = asyncio.get_running_loop().create_future()
        self._opened.add_done_callback(_look_at_error)
        self._task = asyncio.create_task(self._live(self._opened))
        try:
            async with asyncio.timeout(self._seconds):
                self.client = await asyncio.shield(self._opened)
        except TimeoutError:
            await self.close()
            raise McpError(f"{self._server.name} did not answer within {self._seconds:g} s.") from None
        except Exception as error:
            self._leave.set()
            words = self.told(error)
            await self.close()
            raise McpError(
                f"{self._server.name} cannot be reached: {words} Check the command or the address."
            ) from error

    async def call(self, name: str, arguments: dict[str, object]) -> "CallToolResult":
        """Call a tool; the end of the connection ends the wait."""
        assert self._task is not None
        call = asyncio.ensure_future(self.client.call_tool(name, arguments))
        try:
            await asyncio.wait([call, self._task], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not call.done():
                call.cancel()
        if not call.done():
            raise ConnectionError("the connection has ended.")
        try:
            return call.result()
        except Exception as error:
            from mcp.shared.exceptions import MCPError
            from mcp_types import CONNECTION_CLOSED

            if not isinstance(error, MCPError) or error.code == CONNECTION_CLOSED:
                self._leave.set()  # the next call connects anew
            raise

    async def close(self) -> None:
        """Leave; a server that was started is ended."""
        self._leave.set()
        if self._task is not None:
            if self._opened is not None and not self._opened.done():
                self._task.cancel()
            await asyncio.wait([self._task], timeout=10.0)
        if self._log is not None:
            self._log.close()

    def told(self, error: BaseException) -> str:
        """What went wrong, with the last words of the server's log."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        words = f"{str(error).rstrip('.') or type(error).__name__}."
        if self._log is not None and not self._log.closed:
            self._log.seek(0)
            said = self._log.read()[-_LOG_CHARS:].strip()
            words += f" It wrote: {said}" if said and not self.is_open else ""
        return words

    async def _live(self, opened: "asyncio.Future[Client]") -> None:
        """The connection's whole life, in one task."""
        try:
            async with AsyncExitStack() as stack:
                client = await stack.enter_async_context(await self._client(stack))
                opened.set_result(client)
                await self._leave.wait()
        except BaseException as error:
            if not opened.done():
                opened.set_exception(
                    error if isinstance(error, Exception) else ConnectionError("it was given up")
                )
            if isinstance(error, asyncio.CancelledError):
                raise
            logging.getLogger("internlm2").debug("The server %s ended: %r", self._server.name, error)

    async def _client(self, stack: AsyncExitStack) -> "Client":
        server, client_class = self._server, _client_class()
        if server.url is not None:
            import httpx2
            from mcp.client.streamable_http import streamable_http_client

            http = httpx2.AsyncClient(headers=dict(server.headers), timeout=self._seconds)
            http = await stack.enter_async_context(http)
            transport = streamable_http_client(server.url, http_client=http)
        else:
            from mcp.client.stdio import StdioServerParameters, stdio_client

            parameters = StdioServerParameters(
                command=server.command[0], args=list(server.command[1:]), env=dict(server.environment)
            )
            self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
            transport = stdio_client(parameters, errlog=self._log)
        return client_class(transport, read_timeout_seconds=self._seconds + _PATIENCE_SECONDS, cache=None)


def _look_at_error(future: asyncio.Future) -> None:
    """Who waited may be gone; an error that nobody reads would be logged."""
    if not future.cancelled():
        future.exception()


def _read(result: "CallToolResult") -> ToolResult:
    """Text and pictures of a result; other content is named."""
    from mcp_types import TextResourceContents

    texts: list[str] = []
    pictures: list[Picture] = []
    for block in result.content:
        if block.type == "text":
            texts.append(block.text)
        elif block.type == "image" and block.mime_type in _PICTURE_TYPES:
            try:
                pictures.append(Picture(block.mime_type, base64.b64decode(block.data, validate=True)))
            except (binascii.Error, ValueError):
                texts.append("[a picture that cannot be read]")
        elif block.type == "resource" and isinstance(block.resource, TextResourceContents):
            texts.append(block.resource.text)
        elif block.type == "resource_link":
            texts.append(f"[a link: {block.uri}]")
        else:
            texts.append(f"[content of type {block.type}, which cannot be shown]")
    if not result.content and result.structured_content is not None:
        texts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return ToolResult("\n".join(texts), tuple(pictures), is_error=result.is_error)


def _short(name: str) -> str:
    """A name as tools have them."""
    allowed = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "server"
    return (allowed if not allowed[0].isdigit() and allowed[0] != "-" else f"_{allowed}")[:64]


def _client_class() -> "type[Client]":
    try:
        from mcp import Client
    except ImportError as error:
        raise MissingDependencyError(
            "Tools of MCP servers need the package mcp, which is not installed. "
            "Install it with: pip install 'internlm2[agent]'"
        ) from error
    return Client
