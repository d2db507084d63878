"""What a page holds of a run's answers, as JSON inside HTML: shared beginnings once, long texts without their middle.

Nothing is left out in silence: `Packed` says how many texts and answers were, and the page shows it.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from internlm2.eval.run_folder import Sample

MAX_BYTES = 58_000_000
TEXT_LIMITS = (100_000, 20_000, 4_000, 1_000)  # characters of one text; the first with which all answers fit
_LEAST_SHARED = 200  # characters of a beginning that is worth being kept apart
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_HALF = re.compile("[\ud800-\udfff]")  # of a character, which UTF-8 cannot spell

Text = str | list[str | int]


@dataclass(frozen=True)
class Packed:
    """json: what the page's script reads. num_shortened: texts that had more than text_limit characters.
    num_left_out: answers that are not on the page, the last ones.
    """

    json: str
    text_limit: int
    num_shortened: int
    num_left_out: int


def embedded(value: object) -> str:
    """JSON that may stand in a `<script>` of HTML, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char, code in _ESCAPED.items():
        text = text.replace(char, code)
    return _HALF.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def pack(runs: Mapping[str, Mapping[str, Sample]], *, max_bytes: int = MAX_BYTES) -> Packed:
    """The answers of some runs by name, in at most `max_bytes`."""
    entries = list(_entries(runs))
    for limit in TEXT_LIMITS:
        packer = _Packer(list(runs), limit, max_bytes)
        num_kept = packer.fill(entries)
        if num_kept == len(entries):
            break
    return Packed(packer.json(), limit, packer.num_shortened, len(entries) - num_kept)


def _entries(runs: Mapping[str, Mapping[str, Sample]]) -> Iterator[tuple[int, Sample, int]]:
    """Run, sample, and how long the beginning of its prompt is that others share; all runs of a question together."""
    shared: dict[tuple[int, str, str, int], int] = {}
    groups: dict[tuple[int, str, str, int], list[str]] = defaultdict(list)
    for n, samples in enumerate(runs.values()):
        for one in samples.values():
            groups[n, one.task, one.subset, one.dropped_shots].append(one.prompt)
    for group, prompts in groups.items():
        length = _length_of_shared(min(prompts), max(prompts)) if len(prompts) > 1 else 0
        shared[group] = length if length >= _LEAST_SHARED else 0
    for key in dict.fromkeys(key for samples in runs.values() for key in samples):
        for n, samples in enumerate(runs.values()):
            if (one := samples.get(key)) is not None:
                yield n, one, shared[n, one.task, one.subset, one.dropped_shots]


def _length_of_shared(first: str, second: str) -> int:
    """Of the whole lines that two texts begin with."""
    num_same = next(
        (n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), len(first)
    )
    return first.rfind("\n", 0, min(num_same, len(second))) + 1


class _Packer:
    """Takes answers as long as there is room for them."""

    def __init__(self, runs: Sequence[str], text_limit: int, max_bytes: int) -> None:
        self._runs = embedded(runs)
        self._limit = text_limit
        self._left_bytes = max_bytes - len(self._runs.encode())
        self._lists: dict[str, dict[str, int]] = {
            name: {} for name in ("tasks", "heads", "prompts", "samples")
        }
        self.num_shortened = 0

    def fill(self, entries: Iterable[tuple[int, Sample, int]]) -> int:
        """Add answers until one has no room; how many had."""
        return sum(1 for _ in takewhile(lambda entry: self.add(*entry), entries))

    def add(self, run: int, sample: Sample, num_shared: int) -> bool:
        """Whether there was room for this answer."""
        before = {name: len(own) for name, own in self._lists.items()}, self._left_bytes, self.num_shortened
        self._put("tasks", sample.task)
        prompt: dict[str, object] = {"t": self._text(sample.prompt[num_shared:])}
        if num_shared:
            prompt["h"] = 1 + self._put("heads", self._text(sample.prompt[:num_shared]))
        place = self._put("prompts", prompt)
        self._put("samples", {"r": run, "k": sample.key, "p": place, **self._fields(sample)})
        if self._left_bytes >= 0:
            return True
        lengths, self._left_bytes, self.num_shortened = before
        for name, own in self._lists.items():
            while len(own) > lengths[name]:
                own.popitem()
        return False

    def json(self) -> str:
        lists = (f'"{name}":[{",".join(own)}]' for name, own in self._lists.items())
        return f'{{"runs":{self._runs},{",".join(lists)}}}'

    def _fields(self, sample: Sample) -> dict[str, object]:
        """Short names, and only what is not empty; a score stands for itself, an error in its place."""
        fields = {
            "s": sample.subset,
            "g": self._text(sample.gold),
            "o": self._text(sample.output),
            "x": self._text(sample.extracted),
            "d": self._text(sample.detail),
            "e": self._text(sample.error),
            "f": sample.finish_reason,
            "l": dict(sample.logprobs),
            "n": [sample.prompt_tokens, sample.output_tokens] if sample.prompt_tokens else [],
            "h": sample.dropped_shots,
            "c": sample.cut_tokens,
        }
        own = {name: value for name, value in fields.items() if value}
        return {"t": sample.task, **own} if sample.error else {"t": sample.task, "v": sample.score, **own}

    def _put(self, name: str, value: object) -> int:
        """The place of a value in one of the lists; what is there already takes no room again."""
        text = embedded(value)
        own = self._lists[name]
        if text not in own:
            own[text] = len(own)
            self._left_bytes -= len(text.encode()) + 1
            texts = [value, *(value.values() if isinstance(value, dict) else ())]
            self.num_shortened += sum(isinstance(one, list) and isinstance(one[0], str) for one in texts)
        return own[text]

    def _text(self, text: str) -> Text:
        if len(text) <= self._limit:
            return text
        half = self._limit // 2
        return [text[:half], len(text) - 2 * half, text[-half:]]
