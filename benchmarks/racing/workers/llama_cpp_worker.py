"""llama.cpp through its server, whose own clocks count. Standard library only."""

import http.client
import json
import socket
import subprocess
import sys
import threading
import time

from wire import end_with_parent, serve


class LlamaCpp:
    """settings: command of llama-server without its port."""

    def __init__(self, settings: dict[str, object]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        command = [*settings["command"], "--host", "127.0.0.1", "--port", str(self._port)]
        self._server = subprocess.Popen(
            command,
            stdout=sys.stderr,
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - no other thread yet
        )
        while not self._is_up():
            if self._server.poll() is not None:
                sys.exit(f"{' '.join(command)} ended with {self._server.returncode}.")
            time.sleep(0.1)
        self._slots: dict[tuple[int, ...], int] = {}
        self.facts = {"settings": " ".join(command[1:-4])}

    def _is_up(self) -> bool:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def _slot(self, prompt: list[int]) -> int:
        """Where a prompt is kept: slot 0 is for those that are not."""
        return self._slots.setdefault(tuple(prompt), len(self._slots) + 1)

    def _ask(self, prompt: list[int] | str, tokens: int, *, slot: int = 0, keep: bool = False) -> dict:
        body = {
            "prompt": prompt,
            "n_predict": tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "samplers": ["temperature"],  # greedy, without passes over the logits that change nothing
            "cache_prompt": keep,
            "id_slot": slot,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/completion", json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
        if "error" in answer:
            raise RuntimeError(str(answer["error"]))
        return answer

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, object]:
        """Each stream in a slot of its own, where its prompt is kept."""
        answers: list[dict] = [{} for _ in prompts]

        def one(n: int) -> None:
            answers[n] = self._ask(prompts[n], tokens, slot=self._slot(prompts[n]), keep=True)

        threads = [threading.Thread(target=one, args=(n,)) for n in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = [answer["timings"]["predicted_n"] - 1 for answer in answers]
        # Every stream's own speed, added: the first tokens may come a step apart, which this does not hold against it.
        each = [answer["timings"]["predicted_ms"] / 1e3 for answer in answers]
        speed = sum(count / seconds for count, seconds in zip(counts, each, strict=True))
        return {"seconds": sum(counts) / speed, "tokens": sum(counts)}

    def prefill(self, prompt: list[int]) -> dict[str, object]:
        """The server's own time for the prompt."""
        timings = self._ask(prompt, 1)["timings"]
        return {"seconds": timings["prompt_ms"] / 1e3, "tokens": timings["prompt_n"]}

    def text(self, prompt: str, tokens: int) -> dict[str, object]:
        """One request."""
        started = time.perf_counter()
        answer = self._ask(prompt, tokens)
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "tokens": answer["timings"]["predicted_n"],
            "text": answer["content"],
        }


if __name__ == "__main__":
    serve(LlamaCpp)
