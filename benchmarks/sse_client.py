"""A small streaming client for load: one connection a request, as little work for each token as possible."""

import asyncio
import json
import time
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass
class Asked:
    """What one request got. status: 0 when the connection failed. first_seconds: None before a first token."""

    status: int = 0
    first_seconds: float | None = None
    seconds: float = 0.0
    num_pieces: int = 0
    num_tokens: int = 0  # as the server counts them; 0 where the client left
    has_ended: bool = False  # with the mark that ends a stream
    has_left: bool = False
    retry_after: float = 1.0
    error: str = ""


async def ask(url: str, body: dict[str, object], *, leave_after: int | None = None) -> Asked:
    """Stream one answer of `/v1/chat/completions`. leave_after: hang up after so many pieces."""
    asked = Asked()
    started = time.perf_counter()
    writer: asyncio.StreamWriter | None = None
    try:
        place = urlsplit(url)
        reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 20)
        sent = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(sent)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + sent)
        await writer.drain()
        asked.status = int((await reader.readline()).split()[1])
        await _read_head(reader, asked)
        while line := await reader.readline():
            if not line.startswith(b"data:"):
                if asked.status != 200:
                    asked.error += line.decode("utf-8", "replace")
                continue
            if line[5:].strip() == b"[DONE]":
                asked.has_ended = True
                break
            _take(json.loads(line[5:]), asked, started)
            if leave_after is not None and asked.num_pieces >= leave_after:
                asked.has_left = True
                break
    except (OSError, ValueError, IndexError, asyncio.IncompleteReadError) as error:
        asked.error = asked.error or f"{type(error).__name__}: {error}"
    finally:
        if writer is not None:
            writer.close()
    asked.seconds = time.perf_counter() - started
    return asked


async def _read_head(reader: asyncio.StreamReader, asked: Asked) -> None:
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        if name.lower() == "retry-after":
            asked.retry_after = float(value)


def _take(event: dict[str, object], asked: Asked, started: float) -> None:
    if "error" in event:
        asked.error = json.dumps(event["error"])
    choices, usage = event.get("choices"), event.get("usage")
    if isinstance(usage, dict):
        asked.num_tokens = int(usage["completion_tokens"])
    if isinstance(choices, list) and choices and choices[0].get("delta", {}).get("content"):
        asked.num_pieces += 1
        if asked.first_seconds is None:
            asked.first_seconds = time.perf_counter() - started
