"""Writes the text of a tokenizer.json: from a sentencepiece BPE model, or from the fields of a GGUF file.

sentencepiece merges any two neighbours whose join is a piece: the highest score first, the leftmost of
equal scores. The library `tokenizers` merges by a list of pairs, the earliest first. So the list holds every
way to split every piece, sorted by score; and of two pairs with equal score that can overlap as `a b c`,
(a, b) stands before (b, c), because it lies further left.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from internlm2.errors import ExportError, TokenizerError
from internlm2.tokenizer.model_file import BPE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from internlm2.tokenizer.sentencepiece_backend import SentencePieceBackend
from internlm2.tokenizer.special import OLD_SPELLINGS
from internlm2.tokenizer.tokenizer import Tokenizer
from internlm2.tokenizer.tokenizers_backend import TokenizersBackend

_SPACE = "\u2581"
# NUL must become byte piece 3, as in sentencepiece, so its own slot may not be spelled "\0".
_NUL_SLOT = "<0x00 as a piece>"


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer.json with the same ids.

    Raises ExportError for sentencepiece models that are not BPE with byte fallback and without rules.
    """
    backend = tokenizer.backend
    if isinstance(backend, TokenizersBackend):
        return backend.content
    assert isinstance(backend, SentencePieceBackend)
    model = backend.model
    plain = not (model.add_dummy_prefix or model.remove_extra_whitespaces or model.has_normalizer_rules)
    if model.model_type != BPE or not model.byte_fallback or not model.escape_whitespaces or not plain:
        raise ExportError(
            "Only sentencepiece models of type BPE with byte fallback, without normaliser rules and dummy "
            "prefix, such as InternLM2's, can be written as tokenizer.json. Keep tokenizer.model instead."
        )
    names = tokenizer.specials.names
    tokens = [names.get(i, _NUL_SLOT if t == "\0" else t) for i, t in enumerate(backend.tokens)]
    scores = {p.text: p.score for p in model.pieces if p.kind == NORMAL and p.text != "\0"}
    unknown = next((p.text for p in model.pieces if p.kind == UNKNOWN), None)
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokenizer, backend),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": None,
        "post_processor": _post_processor(tokenizer),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _NUL_SLOT}, "content": "\0"},
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in rank_merges(scores).pairs],
        },
    }
    return json.dumps(data, ensure_ascii=False)


def _added_tokens(tokenizer: Tokenizer, backend: SentencePieceBackend) -> list[dict[str, object]]:
    """Control pieces, the six markers, and the user-defined pieces that sentencepiece matches first.

    The other spare slots stay ordinary entries: no merge makes them, so their spelling stays text.
    """
    markers = set(OLD_SPELLINGS.values())
    added: list[dict[str, object]] = []
    for i, piece in enumerate(backend.model.pieces):
        name = tokenizer.specials.names.get(i)
        spare = name is not None and name.startswith("[UNUSED_TOKEN_")
        if piece.kind in (CONTROL, UNKNOWN) or name in markers or (name is not None and not spare):
            added.append(_added_token(i, name or piece.text, is_special=True))
        elif piece.kind == USER_DEFINED and not spare:
            added.append(_added_token(i, piece.text, is_special=False))
    return added


def _added_token(token_id: int, content: str, *, is_special: bool) -> dict[str, object]:
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": is_special,
    }


def _post_processor(tokenizer: Tokenizer) -> dict[str, object] | None:
    """Puts the start token before every text, as the official tokenizer does."""
    if tokenizer.bos_id is None:
        return None
    bos = tokenizer.id_to_token(tokenizer.bos_id)
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            start,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": bos, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }


Pair = tuple[str, str]


@dataclass(frozen=True)
class Merges:
    """pairs: in order of rank. unordered: groups of equal score that no order makes right everywhere."""

    pairs: list[Pair]
    unordered: list[list[Pair]]


def rank_merges(scores: Mapping[str, float]) -> Merges:
    """The merges of a BPE vocabulary. scores: every piece that text can form, single characters too."""
    groups: defaultdict[float, list[Pair]] = defaultdict(list)
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                groups[score].append((left, right))
    pairs: list[Pair] = []
    unordered: list[list[Pair]] = []
    for score in sorted(groups, reverse=True):
        ordered, is_right = _order(groups[score])
        pairs.extend(ordered)
        if not is_right:
            unordered.append(ordered)
    return Merges(pairs, unordered)


def _order(group: Sequence[Pair]) -> tuple[list[Pair], bool]:
    """Order pairs of one score by what can lie further left; False where that goes in a circle."""
    if len(group) == 1:
        return list(group), True
    by_right: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in group:
        by_right[pair[1]].append(pair)
    before = {pair: [other for other in by_right[pair[0]] if other != pair] for pair in group}
    if not any(before.values()):
        return list(group), True
    try:
        return list(TopologicalSorter(before).static_order()), True
    except CycleError:
        return list(group), False


# llama.cpp's names of pre-tokenizers (src/llama-vocab.cpp); "smollm" and "gpt-2" are written as the models'
# own tokenizer.json has them.
_GGUF_CONTROL, _GGUF_USER_DEFINED = 3, 4  # of gguf.TokenType

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(*, use_regex: bool) -> dict[str, object]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_PRE_TOKENIZERS: dict[str, list[dict[str, object]]] = {
    "smollm": [{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)],
    "gpt-2": [_bytes(use_regex=True)],
    "default": [
        _split(r"[\p{P}\$\+<=>\^~\|]+"),
        _split(_WORDS),
        _split(r"\p{N}+"),
        _split(r"[0-9][0-9][0-9]"),
        _bytes(use_regex=False),
    ],
    "llama-bpe": [_split(_CL100K % "1,3"), _bytes(use_regex=False)],
    "qwen2": [_split(_CL100K % "1"), _bytes(use_regex=False)],
}


def byte_level_bpe_json(
    tokens: Sequence[str], merges: Sequence[str], token_types: Sequence[int], pre: str
) -> str:
    """The text of a tokenizer.json. The arguments are GGUF's `tokenizer.ggml.*` fields.

    Raises TokenizerError for a `pre` that we do not know, or fields that do not fit together.
    """
    if pre not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"The pre-tokenizer {pre!r} is not known. Known: {', '.join(_PRE_TOKENIZERS)}. "
            "Take the model's own tokenizer.json instead."
        )
    if len(tokens) != len(token_types):
        raise TokenizerError(f"The vocabulary has {len(tokens)} tokens but {len(token_types)} token types.")
    pairs = [merge.split(" ") for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise TokenizerError(
                f"The merge {' '.join(pair)!r} does not join two tokens of the vocabulary to a third."
            )
    added = [
        _added_token(i, token, is_special=kind == _GGUF_CONTROL)
        for i, (token, kind) in enumerate(zip(tokens, token_types, strict=True))
        if kind in (_GGUF_CONTROL, _GGUF_USER_DEFINED)
    ]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": _bytes(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": vocabulary,
            "merges": pairs,
        },
    }
    return json.dumps(data, ensure_ascii=False)
