"""A small server that answers as a test says, for models behind an endpoint."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = tuple[int, object]


@dataclass
class Server:
    """url: to give to a model. seen: path, headers and body of each request."""

    url: str = ""
    seen: list[tuple[str, dict[str, str], dict]] = field(default_factory=list)

    @property
    def bodies(self) -> list[dict]:
        return [body for _, _, body in self.seen]


@contextmanager
def serving(reply: Callable[[str, dict], Reply], headers: dict[str, str] | None = None) -> Iterator[Server]:
    """reply: status and content (JSON, or bytes) for a path and a body."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.seen.append((self.path, dict(self.headers), body))
            status, content = reply(self.path, body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def completion(text: str, **more: object) -> dict:
    """What OpenAI's API answers to a prompt or a conversation: both forms at once."""
    choice = {
        "text": text,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        **more,
    }
    return {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 3}}


def echo(text: str, logprob: Callable[[str], float]) -> dict:
    """A prompt with its log-probabilities, each character a token, and one token that had to be generated."""
    tokens = [*text, "!"]
    values = [None, *(logprob(token) for token in tokens[1:])]
    reply = completion(text + "!", logprobs={"tokens": tokens, "token_logprobs": values})
    return reply | {"usage": {"prompt_tokens": len(text), "completion_tokens": 1}}
