"""What a request may ask for: one frozen set of values, checked where it is made."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

from internlm2.errors import RequestError, check

MAX_SAMPLES = 256
MAX_LENGTH = 1 << 31
MAX_LOGPROBS = 64
_WHOLE = ("max_tokens", "min_tokens", "n", "top_k", "priority")
_WHOLE_OR_NONE = ("seed", "logprobs", "prompt_logprobs", "length_limit")
_NUMBERS = (
    "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is answered. Raises RequestError for values outside their range.

    Length: max_tokens: at most so many new tokens. min_tokens: no stop before. length_limit: how long the sequence
    may become with its prompt; None: prompt + max_tokens. It fixes the rotary base of dynamic scaling, so turns of
    one long chat that give the same value share their cached keys.

    Choice: temperature: 0 is greedy, and the four filters after it then do nothing. top_k: 0 is off. top_p, min_p,
    typical_p (arXiv 2202.00666): probability mass kept (1, 0 and 1 are off). seed: None draws a fresh one.
    n: answers for each prompt.

    What is pushed: repetition_penalty: above 1 discourages tokens that the prompt or the answer holds already
    (arXiv 1909.05858). presence_penalty, frequency_penalty: taken from the logits of tokens in the answer, once and
    for each occurrence. logit_bias: id -> what is added to its logit. bad_words, bad_words_ids: texts, and
    sequences of ids, that are never produced; a single id that ends the answer is not held back by them.

    Ends: stop: texts that end the answer and are not part of it. stop_token_ids: ids that end it besides the
    model's own. ignore_eos: go on past the model's own stop tokens; an answer in a form ends nevertheless.

    Form: json_schema, regex, choice: at most one; the answer obeys it.

    Reports: logprobs: None is none; k: the log-probability of each chosen token and of the k best. prompt_logprobs:
    the same for the tokens of the prompt. priority: higher is served first.
    """

    max_tokens: int = 512
    min_tokens: int = 0
    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    length_limit: int | None = None
    json_schema: str | Mapping[str, object] | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    priority: int = 0

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_lengths()
        self._check_choice()
        self._check_pushes()
        self._check_texts()

    def _check_kinds(self) -> None:
        for name in _WHOLE:
            check(_is_whole(getattr(self, name)), name, getattr(self, name), "a whole number")
        for name in _WHOLE_OR_NONE:
            value = getattr(self, name)
            check(value is None or _is_whole(value), name, value, "a whole number or None")
        for name in (*_WHOLE, *_WHOLE_OR_NONE):  # numbers of numpy and torch become plain ones
            if getattr(self, name) is not None:
                object.__setattr__(self, name, int(getattr(self, name)))
        for name in _NUMBERS:
            check(_is_number(getattr(self, name)), name, getattr(self, name), "a number")
        check(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "True or False")
        is_text = self.regex is None or isinstance(self.regex, str)
        check(is_text, "regex", self.regex, "a text or None")
        is_schema = self.json_schema is None or isinstance(self.json_schema, str | Mapping)
        check(is_schema, "json_schema", self.json_schema, "a dict, its text as JSON, or None")

    def _check_lengths(self) -> None:
        check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "from 0 to max_tokens")
        limit = self.length_limit
        check(limit is None or 1 <= limit <= MAX_LENGTH, "length_limit", limit, f"from 1 to {MAX_LENGTH}")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            check(count is None or 0 <= count <= MAX_LOGPROBS, name, count, f"from 0 to {MAX_LOGPROBS}")

    @property
    def has_form(self) -> bool:
        """Whether the answer must obey a schema, a regular expression or a list of choices."""
        return self.json_schema is not None or self.regex is not None or bool(self.choice)

    def _check_choice(self) -> None:
        is_usable = self.temperature == 0 or 1e-4 <= self.temperature <= 1e4
        check(is_usable, "temperature", self.temperature, "0 (greedy) or from 0.0001 to 10000")
        check(1 <= self.n <= MAX_SAMPLES, "n", self.n, f"from 1 to {MAX_SAMPLES}")
        is_varied = self.n == 1 or self.temperature > 0
        check(
            is_varied, "n", self.n, "1 at temperature 0, where all answers are the same (set a temperature)"
        )
        check(self.seed is None or 0 <= self.seed < 1 << 63, "seed", self.seed, "from 0 to 2^63 - 1")
        check(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0 is off)")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        check(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        check(0 < self.typical_p <= 1, "typical_p", self.typical_p, "above 0 and at most 1")

    def _check_pushes(self) -> None:
        penalty = self.repetition_penalty
        check(0.01 <= penalty <= 100, "repetition_penalty", penalty, "from 0.01 to 100")
        for name in ("presence_penalty", "frequency_penalty"):
            check(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "from -2 to 2")
        check(isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, "a dict of id -> number")
        for token, bias in self.logit_bias.items():
            check(_is_id(token), "An id in logit_bias", token, "a whole number from 0 on")
            check(_is_number(bias), f"logit_bias of {token}", bias, "a number")
            check(-100 <= bias <= 100, f"logit_bias of {token}", bias, "from -100 to 100")
        words = self.bad_words_ids
        check(isinstance(words, Collection), "bad_words_ids", words, "a tuple of tuples of ids")
        for word in words:
            is_good = isinstance(word, Collection) and len(word) > 0 and all(map(_is_id, word))
            check(is_good, "A word in bad_words_ids", word, "at least one id, each a whole number from 0 on")

    def _check_texts(self) -> None:
        for name in ("stop", "bad_words", "choice"):
            texts = getattr(self, name)
            check(not isinstance(texts, str), name, texts, "a tuple of texts, not one text")
            is_good = isinstance(texts, Collection) and all(isinstance(text, str) and text for text in texts)
            check(is_good, name, texts, "texts of at least one character")
        is_good = isinstance(self.stop_token_ids, Collection) and all(map(_is_id, self.stop_token_ids))
        check(is_good, "stop_token_ids", self.stop_token_ids, "ids, each a whole number from 0 on")
        forms = [name for name in ("json_schema", "regex") if getattr(self, name) is not None]
        forms += ["choice"] if self.choice else []
        if len(forms) > 1:
            raise RequestError(
                f"{' and '.join(forms)} are given, but an answer has one form. Keep one of them."
            )


def _is_id(token: object) -> bool:
    return isinstance(token, Integral) and int(token) >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
