"""What is run: cells (what is measured) and heats (engines that are in memory together and take turns)."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from racing.engines import find

_WORD_IDS = range(20, 40_000)  # no control tokens, in every vocabulary of the race
TOPICS = ("rivers", "the printing press", "glass", "bees", "sailing ships", "mountains", "bread", "the moon")


@dataclass(frozen=True)
class Cell:
    """One measurement. kind: decode, prefill or text. context: tokens before. is_busy: another program has a core."""

    name: str
    kind: str
    context: int = 0
    tokens: int = 1
    streams: int = 1
    is_busy: bool = False

    def quick(self) -> "Cell":
        """The same with a short prompt and answer, to see whether everything works."""
        return replace(self, context=min(self.context, 64), tokens=min(self.tokens, 9))

    def question(self, number: int) -> dict[str, object]:
        """What a worker is asked in one round; what may be kept from earlier rounds is always the same."""
        if self.kind == "decode":
            # NOTE: the streams of one cell are among those of another, so that engines keep each prompt once.
            draw = random.Random(self.context)
            prompts = [draw.choices(_WORD_IDS, k=self.context) for _ in range(self.streams)]
            return {"do": "decode", "prompts": prompts, "tokens": self.tokens}
        draw = random.Random(f"{self.name} {number} {time.time_ns()}")  # never the same prompt again
        if self.kind == "prefill":
            return {"do": "prefill", "prompt": draw.choices(_WORD_IDS, k=self.context)}
        request = f"{draw.randrange(10**6)}: Write a few paragraphs about {draw.choice(TOPICS)}."
        prompt = f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
        return {"do": "text", "prompt": prompt, "tokens": self.tokens}


DECODE = Cell("decode", "decode", context=512, tokens=33)
SHORT = Cell("decode, context 128", "decode", context=128, tokens=33)
BATCH_8 = Cell("8 streams", "decode", context=128, tokens=33, streams=8)
BATCH_16 = Cell("16 streams", "decode", context=128, tokens=33, streams=16)
PREFILL = Cell("prefill 512", "prefill", context=512)
PREFILL_LONG = Cell("prefill 2048", "prefill", context=2048)
TEXT = Cell("text", "text", tokens=96)
TEXT_BUSY = Cell("text, one core busy", "text", tokens=96, is_busy=True)


@dataclass(frozen=True)
class Heat:
    """Engines that are in memory together, and which of them run which cell, in this order."""

    name: str
    shape: str
    cells: tuple[tuple[Cell, tuple[str, ...]], ...]

    def engines(self) -> list[str]:
        """Names in the order of their first cell."""
        return list(dict.fromkeys(name for _, names in self.cells for name in names))

    def only(self, peers: Sequence[str]) -> "Heat":
        """Without the engines of other peers."""
        cells = [
            (cell, tuple(name for name in names if find(self.shape, name).peer in peers))
            for cell, names in self.cells
        ]
        return Heat(self.name, self.shape, tuple((cell, names) for cell, names in cells if names))


_OUR_FOUR = ("internlm2 int4", "internlm2 int4-symmetric")
_FOUR = (*_OUR_FOUR, "llama.cpp Q4_0", "OpenVINO int4")
_EIGHT = ("internlm2 int8", "llama.cpp Q8_0", "OpenVINO int8", "CTranslate2 int8")
_SIXTEEN = ("internlm2 bf16", "llama.cpp bf16", "transformers bf16")
_DEMO = (
    "internlm2 int4", "internlm2 int8", "llama.cpp own", "OpenVINO int4", "CTranslate2 int8",
    "transformers bf16",
)  # fmt: skip
HEATS = (
    Heat("demo", "demo", ((TEXT, _DEMO), (TEXT_BUSY, (*_DEMO, "llama.cpp own, 1 thread")))),
    Heat(
        "4 bits",
        "1.8b",
        (
            (DECODE, _FOUR),
            (SHORT, _OUR_FOUR),
            (BATCH_8, _FOUR),
            (BATCH_16, _FOUR),
            (PREFILL, (*_FOUR, "CTranslate2 int8")),
            (PREFILL_LONG, (*_OUR_FOUR, "OpenVINO int4", "CTranslate2 int8")),
        ),
    ),
    Heat(
        "8 bits",
        "1.8b",
        (
            (DECODE, _EIGHT),
            (SHORT, ("internlm2 int8",)),
            (BATCH_8, ("internlm2 int8", "CTranslate2 int8")),
            (PREFILL, ("internlm2 int8", "OpenVINO int8")),
            (PREFILL_LONG, ("internlm2 int8", "OpenVINO int8")),
        ),
    ),
    Heat(
        "16 bits",
        "1.8b",
        (
            (DECODE, _SIXTEEN),
            (PREFILL, _SIXTEEN),
            (PREFILL_LONG, ("internlm2 bf16", "transformers bf16")),
        ),
    ),
    Heat("7b", "7b", ((DECODE, ("internlm2 int4-symmetric", "llama.cpp Q4_0")),)),
)
