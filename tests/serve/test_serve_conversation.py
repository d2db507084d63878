"""Which replica a conversation goes to: the same for all its turns, few moves when replicas change, no crowd at one."""

import asyncio
import itertools
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette")

from internlm2.serve import conversation
from internlm2.serve.conversation import HEADER, ConversationHeader, choose, conversation_key, ranked

names = st.lists(st.text(max_size=8), min_size=1, max_size=8, unique=True)
loads = st.dictionaries(st.text(max_size=8), st.integers(0, 300), min_size=1, max_size=8)
texts = st.text(st.characters(), max_size=40)  # surrogates too: JSON may hold them
SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Hello."}
LATER = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "And then?"}]
CHAT = "/v1/chat/completions"


def key(**fields: object) -> str | None:
    return conversation_key(json.dumps(fields).encode())


@given(system=texts, first=texts, later=st.lists(texts, max_size=4))
def test_every_turn_of_a_conversation_has_the_key_of_the_first(system, first, later):
    start = [{"role": "system", "content": system}, {"role": "user", "content": first}]
    turns = [{"role": ("assistant", "user")[index % 2], "content": text} for index, text in enumerate(later)]
    assert key(messages=start, temperature=1) == key(messages=start + turns, stream=True) is not None


def test_other_beginnings_and_models_have_other_keys():
    others = [
        key(messages=[SYSTEM, HELLO]),
        key(messages=[HELLO]),
        key(messages=[SYSTEM, {"role": "user", "content": "Bye."}]),
        key(messages=[{"role": "system", "content": "Be long."}, HELLO]),
        key(messages=[SYSTEM, HELLO], model="an-adapter"),
        key(messages=[SYSTEM, HELLO], prompt_cache_key="a"),
        key(messages=[SYSTEM, HELLO], prompt_cache_key="b"),
        key(input="Hello.", instructions="Be brief."),
        key(prompt="Hello."),
        key(prompt=[1, 2, 3]),
    ]
    assert None not in others
    assert len(set(others)) == len(others)


def test_a_client_says_itself_what_belongs_together():
    assert key(messages=[HELLO], prompt_cache_key="a") == key(messages=[SYSTEM], prompt_cache_key="a")


def test_one_beginning_in_several_forms_has_one_key():
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]}]
    assert key(messages=[HELLO]) == key(messages=parts) == key(messages=[HELLO, *LATER])
    assert key(input="Hello.", instructions="x") == key(input=[HELLO, *LATER], instructions="x")
    assert (
        key(prompt="word " * 60) == key(prompt="word " * 60 + "more") == key(prompt=["word " * 60, "other"])
    )
    assert key(prompt=list(range(300))) == key(prompt=[list(range(400))])


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", b"7", b"{", b"\xff\xfe\x00", b'{"messages": 3}', b'{"messages": ["a"]}', b'{"prompt": null}',
        b'{"prompt": {}}', b'{"prompt": []}', b'{"prompt_cache_key": 3}', b"[" * 100_000, b"9" * 10_000,
        b'{"messages":' + b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_body_that_is_no_conversation_has_no_key(body):
    found = conversation_key(body)
    assert found is None or body == b'{"prompt": []}'


@given(st.binary(max_size=60))
def test_any_bytes_are_taken(body):
    conversation_key(body)


@given(key=st.text(), names=names, data=st.data())
def test_a_replica_that_goes_moves_only_its_own_share(key, names, data):
    gone = data.draw(st.sampled_from(names))
    rest = [name for name in names if name != gone]
    assert ranked(key, rest) == [name for name in ranked(key, names) if name != gone]
    assert ranked(key, names) == ranked(key, names[::-1])


def test_replicas_get_like_shares():
    shares = Counter(ranked(str(index), ["a", "b", "c", "d"])[0] for index in range(4000))
    assert all(850 < share < 1150 for share in shares.values()), shares  # 1000, standard deviation 27


@given(key=st.text(), loads=loads)
def test_no_replica_gets_clearly_more_than_the_least_loaded(key, loads):
    chosen = choose(key, loads)
    least = min(loads.values())
    assert loads[chosen] <= least + max(4, least / 4)
    for passed in ranked(key, list(loads))[: ranked(key, list(loads)).index(chosen)]:
        assert loads[passed] > least + 4  # only the crowded are passed over


def test_busy_replicas_may_differ_by_a_quarter():
    first, second = ranked("k", ["a", "b"])
    assert choose("k", {first: 125, second: 100}) == first
    assert choose("k", {first: 126, second: 100}) == second
    assert choose("k", {first: 5, second: 0}) == second


@given(key=st.text(), loads=st.dictionaries(st.text(max_size=8), st.integers(0, 4), min_size=1))
def test_small_differences_do_not_part_a_conversation_from_its_prefix(key, loads):
    assert choose(key, loads) == ranked(key, list(loads))[0]


def pass_on(incoming, *, path=CHAT, method="POST", headers=()):
    """Headers and messages as the application behind meets them."""

    async def run():
        met = []
        waiting = list(incoming)

        async def receive():
            if not waiting:
                await asyncio.Event().wait()
            return waiting.pop(0)

        async def app(scope, receive, send):
            messages = [await receive() for _ in incoming]
            met.append((dict(scope["headers"]), messages))

        async def send(message):
            raise AssertionError("nothing is sent here")

        scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        await asyncio.wait_for(ConversationHeader(app)(scope, receive, send), 10)
        return met[0]

    return asyncio.run(run())


def request(*pieces: bytes):
    return [
        {"type": "http.request", "body": piece, "more_body": index < len(pieces) - 1}
        for index, piece in enumerate(pieces)
    ]


BODY = json.dumps({"messages": [SYSTEM, HELLO]}).encode()
LEFT = {"type": "http.disconnect"}


@given(cuts=st.lists(st.integers(0, len(BODY)), max_size=4))
def test_a_body_in_pieces_passes_unchanged_and_brings_its_key(cuts):
    ends = [0, *sorted(cuts), len(BODY)]
    incoming = [
        *request(*(BODY[a:b] for a, b in itertools.pairwise(ends))),
        LEFT,
    ]
    headers, messages = pass_on(incoming, headers=[(b"accept", b"x")])
    assert messages == incoming
    assert headers == {b"accept": b"x", HEADER.encode(): conversation_key(BODY).encode()}


@pytest.mark.parametrize("name", [HEADER, HEADER.upper(), HEADER.replace("-", "_")])
def test_a_client_cannot_write_the_header(name):
    forged = [(name.encode(), b"\xff")]
    assert pass_on(request(b"{}"), headers=forged)[0] == {}
    assert pass_on(request(b""), headers=forged, method="GET", path="/metrics")[0] == {}
    assert pass_on(request(BODY), headers=forged)[0] == {HEADER.encode(): conversation_key(BODY).encode()}


def test_other_requests_pass_without_a_key():
    assert pass_on(request(BODY), path="/v1/embeddings")[0] == {}
    assert pass_on(request(BODY), method="PUT")[0] == {}
    assert pass_on([{"type": "http.request", "body": BODY, "more_body": True}, LEFT])[0] == {}


def test_a_large_body_passes_whole_without_a_key():
    piece = b" " * (1 << 19)
    incoming = request(BODY, piece, piece, piece, b"")
    headers, messages = pass_on(incoming)
    assert headers == {}
    assert messages == incoming


def test_a_slow_body_goes_on_to_the_replica(monkeypatch):
    monkeypatch.setattr(conversation, "_MOST_SECONDS", 0.05)

    async def run():
        second = asyncio.Event()
        waiting = request(BODY[:5], BODY[5:])

        async def receive():
            if len(waiting) == 1:
                await second.wait()
            return waiting.pop(0)

        async def app(scope, receive, send):
            assert scope["headers"] == []
            assert (await receive())["body"] == BODY[:5]
            second.set()
            assert (await receive())["body"] == BODY[5:]

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        await asyncio.wait_for(ConversationHeader(app)(scope, receive, None), 10)

    asyncio.run(run())


def test_what_is_no_request_passes():
    async def run():
        async def app(scope, receive, send):
            scope["met"] = True

        scope = {"type": "lifespan"}
        await ConversationHeader(app)(scope, None, None)
        assert scope["met"]

    asyncio.run(run())
