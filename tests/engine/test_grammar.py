"""A model that knows nothing still answers in the form that was asked for, and sees every token that may come."""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator

import pytest
import sentencepiece
import torch

from internlm2 import Tokenizer
from internlm2.engine.sampling.grammar import Constraint, Grammars
from internlm2.errors import MissingDependencyError, RequestError
from official_folder import DATA

llguidance = pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"enum": ["北京", "上海", "New York", None, 7]},
        "note": {"type": "string"},
        "home": {
            "type": "object",
            "properties": {
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
                "at": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
            },
            "required": ["zip", "at"],
            "additionalProperties": False,
        },
        "pets": {"type": "array", "items": {"$ref": "#/$defs/pet"}, "maxItems": 3},
    },
    "required": ["name", "age", "city", "note", "home"],
    "additionalProperties": False,
    "$defs": {
        "pet": {
            "anyOf": [
                {"type": "null"},
                {"type": "object", "properties": {"名字": {"const": '小"白\n'}}, "required": ["名字"]},
            ]
        }
    },
}
TYPES = {
    "object": dict, "array": list, "string": str, "number": (int, float), "integer": int,
    "boolean": bool, "null": type(None),
}  # fmt: skip


def violations(value: object, schema: dict, root: dict) -> Iterator[str]:
    """What in `value` breaks `schema`, for the keywords that these tests use."""
    if "$ref" in schema:
        yield from violations(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema and all(any(violations(value, each, root)) for each in schema["anyOf"]):
        yield f"{value!r} fits none of anyOf"
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        yield f"{value!r} is another value"
    if "type" in schema and not isinstance(value, TYPES[schema["type"]]):
        yield f"{value!r} is no {schema['type']}"
    if isinstance(value, int | float):
        sizes = {"minimum": value, "maximum": value}
    elif isinstance(value, str):
        sizes = {"minLength": len(value), "maxLength": len(value)}
        if not re.search(schema.get("pattern", ""), value):
            yield f"{value!r} breaks the pattern"
    elif isinstance(value, list):
        sizes = {"minItems": len(value), "maxItems": len(value)}
        for each in value:
            yield from violations(each, schema.get("items", {}), root)
    elif isinstance(value, dict):
        sizes = {}
        known = schema.get("properties", {})
        for name in set(schema.get("required", ())) - set(value):
            yield f"{name!r} is missing"
        for name, each in value.items():
            if schema.get("additionalProperties") is False and name not in known:
                yield f"{name!r} is too many"
            yield from violations(each, known.get(name, {}), root)
    else:
        sizes = {}
    for bound, size in sizes.items():
        limit = schema.get(bound, size)
        if size < limit if bound.startswith("min") else size > limit:
            yield f"{value!r} breaks {bound}"


@pytest.fixture(scope="session")
def vocabularies(demo, chat_folder, tmp_path_factory) -> dict[str, Tokenizer]:
    """The real InternLM2 vocabulary, byte-level BPE, bare bytes, and one that drops a leading space."""
    lines = ["hello world", "yes no maybe", "你好 世界 hello", 'a b c {"x": 1} [12, 3]'] * 20
    folder = tmp_path_factory.mktemp("prefix")
    for name, has_bytes in (("tokenizer", True), ("nobytes", False)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(folder / name), vocab_size=330, model_type="bpe",
            byte_fallback=has_bytes, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    (folder / "short").mkdir()
    (folder / "nobytes.model").rename(folder / "short" / "tokenizer.model")
    return {
        "internlm2": Tokenizer.from_pretrained(DATA / "tokenizer"),
        "demo": Tokenizer.from_pretrained(demo),
        "bytes": Tokenizer.from_pretrained(chat_folder),
        "dropped_space": Tokenizer.from_pretrained(folder),
        "no_bytes": Tokenizer.from_pretrained(folder / "short"),
    }


@pytest.fixture(scope="session")
def made(vocabularies) -> dict[str, Grammars]:
    return {
        name: Grammars(tok, stop_ids=tok.stop_ids, vocab_size=tok.vocab_size)
        for name, tok in vocabularies.items()
    }


@pytest.fixture(params=["internlm2", "demo", "bytes", "dropped_space"])
def tok(request, vocabularies) -> Tokenizer:
    return vocabularies[request.param]


@pytest.fixture
def grammars(request, made, tok, vocabularies) -> Grammars:
    return made[next(name for name, each in vocabularies.items() if each is tok)]


def allowed(constraint: Constraint, vocab_size: int) -> torch.Tensor:
    """The bitmask as (V,) bool; bits after V must be clear."""
    mask = torch.full(((vocab_size + 31) // 32,), -1, dtype=torch.int32)
    constraint.fill(mask)
    bits = ((mask[:, None] >> torch.arange(32)) & 1).flatten().bool()
    assert not bits[vocab_size:].any()
    return bits[:vocab_size]


def ids_of(bits: torch.Tensor) -> set[int]:
    return set(bits.nonzero().flatten().tolist())


def answer(tok: Tokenizer, constraint: Constraint, seed: int, *, max_tokens: int = 2000) -> list[int]:
    """Ids that a model of noise chooses, who wishes the more to close what is open the longer it speaks."""
    random = torch.Generator().manual_seed(seed)
    eager = torch.zeros(tok.vocab_size)
    for i, text in enumerate(tok.token_bytes):
        eager[i] = 1.5 * text.startswith(b'"') + 1.0 * text.startswith((b"]", b"}")) - 0.1 * len(text)
    eager[list(tok.stop_ids)] = 1.0
    ids: list[int] = []
    while len(ids) < max_tokens:
        bits = allowed(constraint, tok.vocab_size)
        assert bits.any()
        logits = torch.randn(tok.vocab_size, generator=random) * 3 + eager * min(len(ids) / 4, 30)
        token = int(logits.masked_fill(~bits, -torch.inf).argmax())
        constraint.advance(token)
        if token in tok.stop_ids:
            assert constraint.may_end
            return ids
        assert token not in tok.specials.names
        ids.append(token)
    raise AssertionError(f"no end: {tok.decode(ids)!r}")


def text_of(tok: Tokenizer, ids: list[int]) -> str:
    stream = tok.stream()
    return "".join(stream.push(i) for i in ids) + stream.finish()


@pytest.mark.parametrize("seed", range(6))
def test_noise_writes_json_that_obeys_the_schema(tok, grammars, seed):
    text = text_of(tok, answer(tok, grammars.compile(json_schema=PERSON), seed))
    assert list(violations(json.loads(text), PERSON, PERSON)) == [], text


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "integer"},
        {"type": "number", "minimum": -1.5, "maximum": 20.25},
        {"enum": ["零", "\x01", "\x7f", "\u2028", "😀", '"\\/', "</s>", 1.5, True, None, [1, {"a": "b"}]]},
        {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}, "minItems": 1},
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a", "b"]},
        {"type": "string", "pattern": "^\\x01[\u4e00-\u4e05]+$"},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_noise_obeys_single_parts_of_schemas(tok, grammars, schema, seed):
    text = text_of(tok, answer(tok, grammars.compile(json_schema=json.dumps(schema)), seed))
    assert list(violations(json.loads(text), schema, schema)) == [], text


REGEXES = (
    r"\d{4}-\d{2}-\d{2}", r"(北京|上海|Sh?ang[a-z]{1,3})!?", r" ?x/y\\z", r"[^a]{3}\n\"", r"(?i)yes|no", r"^a|b*$", r" *",
)  # fmt: skip


@pytest.mark.parametrize("regex", REGEXES)
@pytest.mark.parametrize("seed", range(3))
def test_noise_matches_the_regex_wholly(tok, grammars, regex, seed):
    text = text_of(tok, answer(tok, grammars.compile(regex=regex), seed))
    assert re.fullmatch(regex, text), text


@pytest.mark.parametrize("seed", range(6))
def test_noise_chooses_one_of_the_choices(tok, grammars, seed):
    choices = (
        "yes",
        "yes please",
        "no",
        "不",
        "不是",
        " spaced",
        "  twice",
        'say "\\n"\n',
        "<|im_end|>",
        "é",
    )
    assert text_of(tok, answer(tok, grammars.compile(choice=choices), seed)) in choices


def test_json_may_be_compact_or_indented_but_not_stretched(vocabularies, made):
    schema = {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "integer"}}}
    value = {"a": [1, 2], "b": []}
    tok, grammars = vocabularies["bytes"], made["bytes"]

    def fits(text: str) -> bool:
        constraint = grammars.compile(json_schema=schema)
        for i in tok.encode(text):
            if not allowed(constraint, tok.vocab_size)[i]:
                return False
            constraint.advance(i)
        return constraint.is_complete

    assert all(map(fits, (json.dumps(value, indent=n) for n in (None, 1, 2, 4, 8, "\t"))))
    assert fits(json.dumps(value, separators=(",", ":")))
    assert not any(map(fits, (' {"a":[]}', '{"a":  []}', '{"a":[] } ', '{"a":\n\n[]}', '{"a":[1 \n]}')))


def test_a_property_cannot_be_spelled_past_its_schema(vocabularies, made):
    tok, constraint = (
        vocabularies["bytes"],
        made["bytes"].compile(json_schema={"properties": {"a": {"const": 1}}}),
    )
    for i in tok.encode('{"\\'):
        constraint.advance(i)
    assert {tok.decode([i]) for i in ids_of(allowed(constraint, tok.vocab_size))} == set('nrbtf\\"')


MATCHES = {
    "choice": ("yes", "yes please", "no", "不是", "x y", "<|im_end|>", "</s>"),
    "regex": tuple(f"{a}{b}{c}" for a in ("ab", "a", "是") for b in ("0", "1", "00", "01", "10", "11") for c in ("", "x")),
}  # fmt: skip


@pytest.mark.parametrize("form", ["choice", "regex"])
@pytest.mark.parametrize("name", ["internlm2", "demo", "bytes"])
def test_the_bitmask_allows_what_can_become_a_match_and_nothing_else(vocabularies, made, name, form):
    tok, matches = vocabularies[name], [text.encode() for text in MATCHES[form]]
    ids_by_bytes: dict[bytes, set[int]] = defaultdict(set)
    for n in set(range(tok.vocab_size)) - set(tok.specials.names):
        ids_by_bytes[tok.token_bytes[n]].add(n)
    asked = {"choice": MATCHES["choice"]} if form == "choice" else {"regex": "(a|ab|是)[01]{1,2}x?"}
    for path in matches:
        constraint, done = made[name].compile(**asked), b""
        for i in tok.encode(path.decode()):
            rests = [match.removeprefix(done) for match in matches if match.startswith(done)]
            expected = {
                n for rest in rests for end in range(len(rest)) for n in ids_by_bytes[rest[: end + 1]]
            }
            expected |= tok.stop_ids if done in matches else set()
            assert ids_of(allowed(constraint, tok.vocab_size)) == expected
            assert constraint.may_end == (done in matches)
            constraint.advance(i)
            done += tok.token_bytes[i]
        assert constraint.may_end
        assert constraint.is_complete == (ids_of(allowed(constraint, tok.vocab_size)) == tok.stop_ids)


def test_a_first_token_counts_as_it_will_be_decoded(vocabularies, made):
    tok, texts = vocabularies["dropped_space"], ("hello", " hello", "no")
    for form in ({"choice": texts}, {"regex": " ?hello|no"}):
        bits = allowed(made["dropped_space"].compile(**form), tok.vocab_size)
        expected = {
            n for n, text in enumerate(tok.token_bytes)
            if text and n not in tok.specials.names
            and any(f" {t}".encode().startswith(text) or (t[0] != " " and t.encode().startswith(text)) for t in texts)
        }  # fmt: skip
        assert ids_of(bits) == expected
    for prompt in ("", " "):
        constraint = made["dropped_space"].compile(json_schema={"const": [1]})
        for i in [i for i in tok.encode(f"{prompt}[1]") if tok.decode([i]) != ""]:
            assert allowed(constraint, tok.vocab_size)[i]
            constraint.advance(i)
        assert constraint.is_complete


def test_an_embedding_with_more_rows_than_tokens_gives_none_of_them(vocabularies):
    tok = vocabularies["bytes"]
    wide = Grammars(tok, stop_ids=tok.stop_ids, vocab_size=300).compile(regex="(?s:.*)")
    bits = allowed(wide, 300)
    assert not bits[tok.vocab_size :].any()
    assert tok.stop_ids < ids_of(bits)
    invalid = next(i for i, text in enumerate(tok.token_bytes) if text == b"\xff")
    assert not bits[invalid]


def test_stop_ids_change_nothing_and_tokens_can_be_taken_back(vocabularies, made):
    tok = vocabularies["demo"]
    constraint = made["demo"].compile(choice=("ab", "abc", "b"))
    first = allowed(constraint, tok.vocab_size)
    for i in tok.encode("ab"):
        constraint.advance(i)
    later, other = allowed(constraint, tok.vocab_size), constraint.copy()
    for stop in tok.stop_ids:
        constraint.advance(stop)
    assert torch.equal(allowed(constraint, tok.vocab_size), later)
    other.advance(tok.encode("c")[0])
    assert other.is_complete
    assert not constraint.is_complete
    constraint.rollback(len(tok.encode("ab")))
    assert torch.equal(allowed(constraint, tok.vocab_size), first)


def test_the_same_schema_is_built_once(made, monkeypatch):
    made["bytes"].compile(json_schema={"const": "once"})
    monkeypatch.delattr(llguidance, "LLMatcher")
    made["bytes"].compile(json_schema='{"const":   "once"}')


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "Give exactly one of json_schema, regex and choice, but this has none"),
        ({"regex": "a", "choice": ("b",)}, "exactly one of .* but this has regex and choice"),
        ({"json_schema": "{1"}, "json_schema is not JSON: .*Give a JSON object or its text"),
        ({"json_schema": {"enum": [float("nan")]}}, "json_schema is not JSON: Out of range float"),
        ({"json_schema": {"enum": [{1}]}}, "json_schema is not JSON: Object of type set"),
        ({"json_schema": "[" * 100_000}, "json_schema is not JSON: maximum recursion depth"),
        ({"json_schema": "true"}, r'json_schema must be a JSON object such as {"type": "object"}, but is True'),
        ({"json_schema": {"type": "text"}}, "^json_schema cannot be followed: Invalid type: text. What is supported"),
        ({"json_schema": {"uniqueItems": True, "type": "array"}}, 'followed: Unimplemented keys: ."uniqueItems"'),
        ({"json_schema": {"$ref": "https://example.com/x"}}, "followed: Resource .* is not present"),
        ({"json_schema": {"$ref": "#"}}, "followed: no text of this vocabulary matches"),
        ({"json_schema": {"x-guidance": 3}}, "followed: invalid type: integer `3`"),
        ({"json_schema": {"const": "\ud800"}}, "followed: .*unexpected end of hex escape"),
        ({"regex": "(?=a)b"}, "^regex cannot be followed: look-around.* is not supported"),
        ({"regex": "[0-9"}, "^regex cannot be followed: unclosed character class. What is supported"),
        ({"regex": "(" * 9999 + ")" * 9999}, "^regex cannot be followed: exceed the maximum number of nested"),
        ({"regex": r"[^\s\S]"}, "^regex cannot be followed: no text of this vocabulary matches"),
        ({"regex": "a\\"}, r"regex ends in a lone backslash: 'a\\\\'. Write \\\\ for a backslash"),
        ({"regex": "a\ud800"}, r"regex holds the lone surrogate '\\ud800'"),
        ({"choice": ("a", "\udc00")}, r"choice holds the lone surrogate '\\udc00'.*Take it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_with_the_reason(made, asked, message):
    with pytest.raises(RequestError, match=message) as caught:
        made["bytes"].compile(**asked)
    assert len(str(caught.value)) < 500


def test_a_form_that_grows_too_complex_ends_in_an_error_and_not_in_a_cut_answer(vocabularies, made):
    tok = vocabularies["demo"]
    constraint = made["demo"].compile(regex=r"(?s:.{0,40}[a-f].{0,40}[g-k]){40}")
    with pytest.raises(RequestError, match=r"cannot go on in its fixed form: lexer error: too many.*simpler"):
        answer(tok, constraint, 0)


def test_what_the_vocabulary_cannot_spell_is_an_error(vocabularies, made):
    tok = vocabularies["no_bytes"]
    with pytest.raises(
        RequestError, match="cannot go on in its fixed form: no text of this vocabulary matches"
    ):
        answer(tok, made["no_bytes"].compile(choice=("hello é",)), 0)


def test_a_tokenizer_without_a_stop_token_is_refused(vocabularies):
    tok = vocabularies["bytes"]
    with pytest.raises(RequestError, match="This tokenizer has no stop token"):
        Grammars(tok, stop_ids=frozenset(), vocab_size=tok.vocab_size).compile(regex="a")


def test_a_token_that_was_not_allowed_is_our_bug(vocabularies, made):
    with pytest.raises(AssertionError, match="was not allowed"):
        made["bytes"].compile(regex="a").advance(vocabularies["bytes"].encode("b")[0])


def test_without_the_library_the_first_request_says_how_to_get_it(vocabularies, monkeypatch):
    tok = vocabularies["bytes"]
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars = Grammars(tok, stop_ids=tok.stop_ids, vocab_size=tok.vocab_size)
    for form in ({"regex": "a"}, {"choice": ("a",)}, {"json_schema": {}}):
        with pytest.raises(MissingDependencyError, match=r"pip install 'internlm2\[grammar\]'"):
            grammars.compile(**form)
