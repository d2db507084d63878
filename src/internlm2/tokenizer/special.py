"""Which ids are special, and every way in which files and people spell them.

InternLM2's markers sit in the last spare slots of its vocabulary. The sentencepiece model calls them
`[UNUSED_TOKEN_141]`..`[UNUSED_TOKEN_146]`; the published configuration renamed them two days after the
release (InternLM commit abbf036), so folders of both kinds exist and both spellings must work.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from internlm2.errors import TokenizerError

# A piece written in brackets steers the model (`<|im_start|>`, `[UNUSED_TOKEN_146]`, `<tool_call>`);
# user text that merely spells it must stay text. Other extra pieces (`——`) are ordinary text.
MARKER = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ACTION_START, ACTION_END = "<|action_start|>", "<|action_end|>"
INTERPRETER, PLUGIN = "<|interpreter|>", "<|plugin|>"

OLD_SPELLINGS = {
    "[UNUSED_TOKEN_146]": IM_START,
    "[UNUSED_TOKEN_145]": IM_END,
    "[UNUSED_TOKEN_144]": ACTION_START,
    "[UNUSED_TOKEN_143]": ACTION_END,
    "[UNUSED_TOKEN_142]": INTERPRETER,
    "[UNUSED_TOKEN_141]": PLUGIN,
}
_END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class SpecialTokens:
    """The special ids of one vocabulary. ids: every accepted spelling; names: how decoding writes an id."""

    ids: Mapping[str, int]
    names: Mapping[int, str]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    stop_ids: frozenset[int]

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """Finds any accepted spelling; the longest first where one begins like another."""
        spellings = sorted(self.ids, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, spellings)) + ")") if spellings else None


@dataclass(frozen=True)
class FolderConfig:
    """What tokenizer_config.json says, as far as we use it."""

    added_tokens: Mapping[int, str]
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    add_bos_token: bool | None
    default_system: str | None


MAX_ADDED_TOKENS = 10_000


def read_config(folder: Path) -> FolderConfig:
    """Read tokenizer_config.json; an absent file says nothing. Raises TokenizerError when it is damaged."""
    path = folder / "tokenizer_config.json"
    data: dict = {}
    if path.exists():
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            added = data.get("added_tokens_decoder") or {}
            added_tokens = {int(i): _text(token) for i, token in added.items()}
            named = [_text(data.get(key)) for key in ("bos_token", "eos_token", "pad_token")]
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise TokenizerError(
                f"Cannot read {path}: {error}. It must be a JSON object; download or copy it again."
            ) from error
    else:
        added_tokens, named = {}, [None, None, None]
    return FolderConfig(
        added_tokens={i: token for i, token in added_tokens.items() if token is not None},
        bos_token=named[0],
        eos_token=named[1],
        pad_token=named[2],
        add_bos_token=data.get("add_bos_token"),
        default_system=data.get("default_system_prompt"),
    )


def _text(token: str | Mapping[str, str] | None) -> str | None:
    """A token is written as text or as an object that holds it under "content"."""
    content = token["content"] if isinstance(token, Mapping) else token
    if content is not None and not isinstance(content, str):
        raise TypeError(f"a token is written as {content!r}, but must be a text")
    return content


def find(
    tokens: Sequence[str],
    special_ids: Collection[int],
    config: FolderConfig,
    *,
    bos_id: int | None,
    eos_id: int | None = None,
    pad_id: int | None = None,
) -> SpecialTokens:
    """Collect the special ids of a vocabulary.

    tokens: the name of every id; special_ids: those that the vocabulary file itself sets apart;
    bos_id, eos_id, pad_id: what that file says; for the latter two the configuration wins.
    """
    names = {i: OLD_SPELLINGS.get(tokens[i], tokens[i]) for i in sorted(special_ids)}
    ids = {tokens[i]: i for i in names} | {name: i for i, name in names.items()}
    if any(spelling.startswith("[UNUSED_TOKEN_") for spelling in ids):  # InternLM2, whatever the file says
        ids = {old: ids[new] for old, new in OLD_SPELLINGS.items() if new in ids} | ids
    for i, content in config.added_tokens.items():
        # NOTE: transformers 5 saves `<|im_start|>` under 92549, beyond the embedding: the vocabulary wins.
        if content in ids or not MARKER.fullmatch(content):
            continue
        is_spare = i in special_ids or len(tokens) <= i < len(tokens) + MAX_ADDED_TOKENS
        if not is_spare:
            raise TokenizerError(
                f"tokenizer_config.json gives {content!r} the id {i}, which belongs to another token or lies far "
                f"outside the vocabulary of {len(tokens)}. Download or copy that file again."
            )
        ids[content] = i
        names[i] = content

    def lookup(token: str | None) -> int | None:
        return ids.get(token) if token is not None else None

    ends = [i for i in map(lookup, _END_OF_TEXT) if i is not None]
    im_end = lookup(IM_END)
    for candidate in (lookup(config.eos_token), eos_id, *ends, im_end):
        if candidate is not None:
            eos_id = candidate
            break
    pad = lookup(config.pad_token)
    return SpecialTokens(
        ids=ids,
        names=names,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad if pad is not None else pad_id if pad_id is not None else eos_id,
        stop_ids=frozenset(i for i in (eos_id, im_end, *ends) if i is not None),
    )
