"""Answers that follow a JSON schema, a regular expression or a list of choices.

Before every token a grammar tells which tokens keep the text on the way to a full match; the sampler chooses among
these. llguidance does the work: an Earley parser over regular expressions, walked along the trie of the vocabulary.
No other file imports it, and this one only when a request first asks.
"""

import json
import re
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal

import torch

from internlm2.errors import MissingDependencyError, RequestError
from internlm2.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# NOTE: without this option the library allows only its own tokenization wherever one text alone can follow.
_EXACT = '%llguidance {"no_forcing": true}\n'

# Between the parts of JSON: nothing, a space, or a line break with its indentation. At most one of these, or a
# weak model writes blanks for ever.
_WHITESPACE = r"( |\n[ \t]{0,32})"

# A control character in the JSON text of a schema: itself, or as a pattern may write it.
_CONTROL = re.compile(r"(?<!\\)(\\\\)*(\\u00([01]|7f)|\\\\[xucv0])")

_NUM_CACHED = 64

_What = Literal["json_schema", "regex", "choice"]


class Grammars:
    """Makes the constraints of requests, for one tokenizer. Nothing is built before the first one.

    stop_ids: ids that end an answer. vocab_size: V, how many ids the bitmask covers; at least the tokenizer's.

    >>> constraint = Grammars(tok, stop_ids=tok.stop_ids, vocab_size=tok.vocab_size).compile(choice=("yes", "no"))
    >>> constraint.fill(bitmask)
    """

    def __init__(self, tokenizer: Tokenizer, *, stop_ids: frozenset[int], vocab_size: int) -> None:
        assert vocab_size >= max(tokenizer.vocab_size, 1 + max(stop_ids, default=0))
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._vocab_size = vocab_size
        self._cached = lru_cache(maxsize=_NUM_CACHED)(self._build)

    def compile(
        self,
        *,
        json_schema: str | Mapping[str, object] | None = None,
        regex: str | None = None,
        choice: tuple[str, ...] = (),
    ) -> "Constraint":
        """A fresh constraint for one answer. The last grammars are kept, so that the same one is built once.

        json_schema: an object, or its JSON text. regex: the whole answer matches it. choice: the answer is one of
        these. Raises RequestError unless exactly one is given and it can be followed, MissingDependencyError
        without llguidance.
        """
        given = {"json_schema": json_schema is not None, "regex": regex is not None, "choice": bool(choice)}
        if sum(given.values()) != 1:
            named = " and ".join(name for name, is_given in given.items() if is_given) or "none"
            raise RequestError(f"Give exactly one of json_schema, regex and choice, but this has {named}.")
        if not self._stop_ids:
            raise RequestError(
                "This tokenizer has no stop token, so an answer with a fixed form could not end. "
                "Use a folder whose tokenizer names one, such as </s>."
            )
        # The model's first token loses a leading space in decoding, where encoding put one before the text.
        may_drop = self._tokenizer.backend.drops_leading_space
        if json_schema is not None:
            matcher = self._cached(_json_rules(json_schema, may_drop=may_drop), "json_schema")
        elif regex is not None:
            matcher = self._cached(_regex_rules(regex, may_drop=may_drop), "regex")
        else:
            matcher = self._cached(_choice_rules(choice, may_drop=may_drop), "choice")
        return Constraint(matcher.deep_copy(), stop_ids=self._stop_ids, vocab_size=self._vocab_size)

    def _build(self, rules: str, what: _What) -> "LLMatcher":
        """Compile a grammar and compute its first mask, which shows whether anything can match."""
        llguidance = _llguidance()
        matcher = llguidance.LLMatcher(
            self._vocabulary,
            _EXACT + rules,
            log_level=0,
            limits=llguidance.LLParserLimits(verbose_errors=False),
        )
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise RequestError(
                f"{what} cannot be followed: {_reason(matcher.get_error())}. "
                "What is supported: docs/structured-output.md."
            )
        return matcher

    @cached_property
    def _vocabulary(self) -> "LLTokenizer":
        llguidance = _llguidance()
        source = _Vocabulary(self._tokenizer, self._stop_ids, self._vocab_size)
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(source), eos_token=sorted(self._stop_ids))


class Constraint:
    """The grammar of one sequence, at the place where its text stands. Made by `Grammars.compile`."""

    def __init__(self, matcher: "LLMatcher", *, stop_ids: frozenset[int], vocab_size: int) -> None:
        self._matcher = matcher
        self._stop_ids = stop_ids
        self._vocab_size = vocab_size
        self._num_words = (vocab_size + 31) // 32

    def fill(self, bitmask: torch.Tensor) -> None:
        """Write which tokens may come next.

        bitmask: (ceil(V / 32),) int32 on the CPU, contiguous; bit i % 32 of word i // 32 says whether id i may come.
        All stop ids may where the text is a full match; they alone where nothing can follow. Raises RequestError
        when the grammar outgrows the library's limits, or the vocabulary cannot spell what must follow.
        """
        assert bitmask.shape == (self._num_words,), bitmask.shape
        assert bitmask.dtype == torch.int32
        assert bitmask.is_cpu
        assert bitmask.is_contiguous()
        self._matcher.unsafe_compute_mask_ptr(bitmask.data_ptr(), 4 * self._num_words)
        self._check()  # NOTE: a matcher in error allows the stop ids, so that a broken answer would look whole

    def advance(self, token_id: int) -> None:
        """Take an allowed token; a stop id changes nothing. Raises RequestError as `fill` does."""
        if token_id in self._stop_ids:
            return
        if not self._matcher.consume_token(token_id):
            assert "satisfy the grammar" not in self._matcher.get_error(), f"id {token_id} was not allowed"
            self._check()

    @property
    def may_end(self) -> bool:
        """Whether the text so far is a full match."""
        return self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether the text so far is a full match that nothing can follow: no need to wait for a stop id."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens, stop ids not counted."""
        is_done = self._matcher.rollback(num_tokens)
        assert is_done, self._matcher.get_error()

    def copy(self) -> "Constraint":
        """The same place, to go on from independently."""
        return Constraint(self._matcher.deep_copy(), stop_ids=self._stop_ids, vocab_size=self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(
                f"The answer cannot go on in its fixed form: {_reason(self._matcher.get_error())}. "
                "Make the schema or regex simpler: fewer alternatives, shorter repetitions."
            )


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        unused = [b""] * (vocab_size - tokenizer.vocab_size)  # never allowed
        self.tokens = [*tokenizer.token_bytes, *unused]
        self.special_token_ids = sorted(stop_ids.union(tokenizer.specials.names))
        self.eos_token_id = min(stop_ids)
        self.bos_token_id = tokenizer.bos_id

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace"))


def _json_rules(schema: str | Mapping[str, object], *, may_drop: bool) -> str:
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else dict(schema)
        if not isinstance(parsed, dict):
            raise RequestError(
                f'json_schema must be a JSON object such as {{"type": "object"}}, but is {parsed!r:.80}.'
            )
        text = json.dumps(parsed, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"json_schema is not JSON: {error}. Give a JSON object or its text.") from error
    # NOTE: with \u in keys, a model can spell a property's name in a second way, past that property's schema. Without
    # it the library drops control characters from texts and patterns; so it is allowed where the schema has some.
    escapes = 'nrbtf\\"u' if _CONTROL.search(text) else 'nrbtf\\"'
    options = {"whitespace_pattern": _WHITESPACE, "json_allowed_escapes": escapes}
    own = parsed.get("x-guidance", {})
    text = json.dumps({**parsed, "x-guidance": options | own if isinstance(own, dict) else own})
    space = '" "? ' if may_drop else ""
    return f"start: {space}value\nvalue: %json {text}"


def _regex_rules(regex: str, *, may_drop: bool) -> str:
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise RequestError(f"regex ends in a lone backslash: {regex[-80:]!r}. Write \\\\ for a backslash.")
    _check_unicode("regex", regex)
    pattern = _llguidance().regex_to_lark(regex, use_ascii="d")
    if may_drop:
        return f'start: TEXT\nTEXT: " " OWN | OWN & ~SPACED\nOWN: /{pattern}/\nSPACED: /[ ](?s:.)*/'
    return f"start: /{pattern}/"


def _choice_rules(choice: tuple[str, ...], *, may_drop: bool) -> str:
    for text in choice:
        _check_unicode("choice", text)
    if may_drop:
        choice = tuple(f" {text}" for text in choice) + tuple(t for t in choice if not t.startswith(" "))
    return "start: TEXT\nTEXT: " + " | ".join(map(json.dumps, choice))


def _check_unicode(what: _What, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} holds the lone surrogate {text[error.start]!a}, which no text can hold. Take it out."
        ) from error


def _reason(message: str) -> str:
    """What the library says, without its own grammar and state."""
    if message.startswith("NoExtensionBias"):
        return "no text of this vocabulary matches"
    text = message.partition("\n<")[0].partition("\n   1 | ")[0].splitlines()[-1]
    for prefix in (r"(at )?\d+\(\d+\): ", "failed to compile JSON schema: ", ".*\\(in regex\\): ", "error: "):
        text = re.sub("^" + prefix, "", text)
    return text[:300].rstrip(". ")


def _llguidance():
    try:
        import llguidance
    except ImportError as error:
        raise MissingDependencyError(
            "json_schema, regex and choice need llguidance, which is not installed. "
            "Install it with: pip install 'internlm2[grammar]'"
        ) from error
    return llguidance
