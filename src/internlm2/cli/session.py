"""One conversation: its messages, its commands, and answers that can be stopped without losing it."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from internlm2 import files
from internlm2.cli.generate import PromptProgress, speed_per_second, stats_line
from internlm2.errors import ExportError, InternLM2Error

if TYPE_CHECKING:
    from internlm2.engine.llm import LLM
    from internlm2.engine.sampling.params import SamplingParams

COMMANDS = {
    "/help": "show these commands",
    "/reset": "forget the conversation, keep the system message",
    "/system TEXT": "set the system message and start anew; without TEXT, remove it",
    "/save FILE": "write the conversation as JSON",
    "/quit": "leave (also Ctrl-D)",
}


class ChatSession:
    """Messages so far, and the model that answers them."""

    def __init__(
        self,
        llm: "LLM",
        params: "SamplingParams",
        *,
        system: str | None = None,
        adapter: str | None = None,
    ) -> None:
        self._llm = llm
        self._adapter = adapter
        self._params = params
        self._system = system
        self.messages: list[dict[str, object]] = []
        self._reset()

    def answer(self, text: str) -> bool:
        """Answer one message on stdout; False when it was refused.

        Ctrl-C stops the answer; what was said so far stays in the history.
        """
        self.messages.append({"role": "user", "content": text})
        said, num_tokens, first_seconds = "", 0, 0.0
        started = time.monotonic()
        reading = PromptProgress()
        try:
            for piece in self._llm.stream_chat(
                self.messages, self._params, adapter=self._adapter, on_progress=reading
            ):
                reading.close()
                first_seconds = first_seconds or time.monotonic() - started
                said += piece.text
                num_tokens += len(piece.token_ids)
                print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)
        except InternLM2Error as error:
            self.messages.pop()
            print(f"Error: {error}", file=sys.stderr)
            return False
        finally:
            reading.close()
        self.messages.append({"role": "assistant", "content": said})
        print()
        if sys.stdout.isatty():
            speed = speed_per_second(num_tokens, time.monotonic() - started - first_seconds)
            print(stats_line(num_tokens, first_seconds, speed), file=sys.stderr)
        return True

    def command(self, line: str) -> bool:
        """Carry out a line that starts with a slash; returns False when it is time to leave."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit"):
            return False
        if word == "/help":
            print("\n".join(f"  {name:<14}{text}" for name, text in COMMANDS.items()), file=sys.stderr)
        elif word == "/reset":
            self._reset()
            print("(forgotten)", file=sys.stderr)
        elif word == "/system":
            self._system = rest or None
            self._reset()
            print("(system message set)" if rest else "(system message removed)", file=sys.stderr)
        elif word == "/save":
            self._save(rest)
        else:
            from internlm2.config import suggest

            known = [name.split()[0] for name in COMMANDS]
            print(f"No command {word}. {suggest(word, known)}", file=sys.stderr)
        return True

    def _reset(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def _save(self, name: str) -> None:
        if not name:
            print("Give a file name: /save talk.json", file=sys.stderr)
            return
        try:
            path = Path(name).expanduser()
            if path.is_dir():
                raise ExportError(f"{path} is a folder. Give a file name: /save talk.json")
            files.check_new(path)
            files.write_text(path, json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n")
        except (InternLM2Error, OSError, RuntimeError) as error:  # RuntimeError: ~nobody has no home
            print(f"Error: {error}", file=sys.stderr)
            return
        print(f"(saved to {path})", file=sys.stderr)
