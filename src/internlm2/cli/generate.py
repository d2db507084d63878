"""`internlm2 generate`: complete a prompt, streaming, or answer one message with `--chat`."""

import json
import sys
import time
from contextlib import ExitStack
from typing import Annotated

from cyclopts import Parameter

from internlm2.cli import options
from internlm2.cli.options import RunFlags
from internlm2.errors import RequestError
from internlm2.log import BarProgress, LineProgress, progress

LONG_PROMPT_TOKENS = 1000


def generate(
    model: Annotated[str, Parameter(help="Folder, GGUF file, Hugging Face id, or `demo`.")],
    prompt: Annotated[str | None, Parameter(help="The text; without it, standard input is read.")] = None,
    *,
    chat: Annotated[
        bool, Parameter(help="Treat the prompt as a message to a chat model.", negative=())
    ] = False,
    system: Annotated[str | None, Parameter(help="System message; implies --chat.")] = None,
    json_output: Annotated[bool, Parameter("--json", help="Print one JSON object.", negative=())] = False,
    flags: RunFlags | None = None,
) -> None:
    """Complete a prompt and print the answer as it appears; speed goes to stderr."""
    config = options.resolve(flags)
    params = options.sampling(config)
    text = read_prompt(prompt)
    llm = options.load_llm(model, config)
    ids = llm.encode(text)
    if chat or system is not None:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        ids = llm.tokenizer.apply_chat(messages)
    started = time.monotonic()
    first_seconds = 0.0
    num_tokens, answer, reason = 0, "", None
    reading = PromptProgress()
    for piece in llm.stream(ids, params, adapter=options.adapter_name(config), on_progress=reading):
        reading.close()
        first_seconds = first_seconds or time.monotonic() - started
        num_tokens += len(piece.token_ids)
        answer += piece.text
        reason = piece.finish_reason
        if not json_output:
            print(piece.text, end="", flush=True)
    seconds = time.monotonic() - started
    speed = speed_per_second(num_tokens, seconds - first_seconds)
    if json_output:
        result = {
            "text": answer,
            "finish_reason": reason,
            "num_prompt_tokens": len(ids),
            "num_tokens": num_tokens,
            "first_token_seconds": round(first_seconds, 4),
            "tokens_per_second": round(speed, 2),
        }
        print(json.dumps(result, ensure_ascii=False))
        return
    print()
    print(stats_line(num_tokens, first_seconds, speed), file=sys.stderr)


class PromptProgress:
    """Shows how far a long prompt is read; nothing for one that a step or two computes."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._bar: LineProgress | BarProgress | None = None
        self._num_shown = 0

    def __call__(self, num_done: int, num_prompt: int) -> None:
        """As `on_progress` of `LLM.stream`."""
        if self._bar is None and num_prompt - num_done > LONG_PROMPT_TOKENS:
            bar = progress("Reading the prompt", total=num_prompt, unit="tokens")
            self._bar = self._open.enter_context(bar)
        if self._bar is not None:
            self._bar.advance(num_done - self._num_shown)
            self._num_shown = num_done

    def close(self) -> None:
        """Take the bar away; a second call does nothing."""
        self._open.close()


def stats_line(num_tokens: int, first_seconds: float, speed: float) -> str:
    """The line after an answer: how long, how fast."""
    return f"[{num_tokens} tokens, first after {first_seconds:.2f} s, then {speed:.1f} tokens/s]"


def speed_per_second(num_tokens: int, seconds_after_first: float) -> float:
    """Decode speed: the tokens after the first, over the time they took."""
    return (num_tokens - 1) / seconds_after_first if num_tokens > 1 and seconds_after_first > 0 else 0.0


def read_prompt(prompt: str | None) -> str:
    """The prompt itself, or all of a piped standard input."""
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if not prompt:
        raise RequestError(
            'No prompt. Write it after the model, as in `internlm2 generate demo "Hello"`, or pipe it in.'
        )
    return prompt
