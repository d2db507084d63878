"""Embeddings and rewards against the engine."""

import httpx2
import openai
import pytest
import torch
from serve_running import running

from folders import write_chat_folder
from internlm2 import RewardScorer

TEXTS = ["Hello", "a longer text", "你好"]
CHATS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
    for text in ("good", "bad", "???")
]


def test_embeddings_are_the_engines(tiny, tiny_llm):
    client = tiny.client()
    expected = tiny_llm.embed(TEXTS)
    for form in ("float", "base64"):  # the client reads both
        got = client.embeddings.create(model="tiny", input=TEXTS, encoding_format=form)
        rows = [row.embedding for row in got.data]
        if form == "base64":
            import base64

            rows = [
                torch.frombuffer(bytearray(base64.b64decode(row)), dtype=torch.float32).tolist()
                for row in rows
            ]
        torch.testing.assert_close(torch.tensor(rows), expected, atol=1e-5, rtol=1e-5)
    got = client.embeddings.create(model="tiny", input=TEXTS)  # as the client asks by itself
    torch.testing.assert_close(
        torch.tensor([row.embedding for row in got.data]), expected, atol=1e-5, rtol=1e-5
    )
    assert [row.index for row in got.data] == [0, 1, 2]
    assert got.usage.prompt_tokens == sum(len(tiny_llm.encode(text)) for text in TEXTS)
    one = client.embeddings.create(model="tiny", input=tiny_llm.encode(TEXTS[0]), dimensions=64)
    torch.testing.assert_close(torch.tensor(one.data[0].embedding), expected[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(openai.BadRequestError, match="the vectors of this model have 64"):
        client.embeddings.create(model="tiny", input="x", dimensions=8)
    with pytest.raises(openai.BadRequestError, match="gives no rewards"):
        client.post("/score", body={"conversations": CHATS}, cast_to=object)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = write_chat_folder(tmp_path_factory.mktemp("reward") / "model", head="reward")
    return RewardScorer(folder, dtype="float32")


def test_a_reward_model_scores_and_ranks(scorer):
    expected = scorer.scores(CHATS)
    with running(scorer) as server:
        got = httpx2.post(f"{server.url}/v1/score", json={"conversations": CHATS}).json()
        assert [row["index"] for row in got["data"]] == [0, 1, 2]
        assert [row["score"] for row in got["data"]] == pytest.approx(expected, abs=1e-5)
        assert got["usage"]["prompt_tokens"] == sum(len(scorer.encode(chat)) for chat in CHATS)
        body = {"messages": CHATS[0][:1], "answers": ["good", "bad", "???"]}
        ranked = httpx2.post(f"{server.url}/v1/rank", json=body).json()["data"]
        assert [row["index"] for row in ranked] == scorer.rank(CHATS)
        assert [row["score"] for row in ranked] == sorted((row["score"] for row in ranked), reverse=True)
        client = server.client()
        with pytest.raises(openai.BadRequestError, match=r"which writes no text\. Use /v1/score"):
            client.chat.completions.create(model="tiny", messages=CHATS[0])
        assert client.models.retrieve("tiny").kind == "reward"
        wrong = httpx2.post(
            f"{server.url}/v1/score", json={"conversations": [[{"role": "king", "content": "x"}]]}
        )
        assert wrong.status_code == 400
        many = httpx2.post(f"{server.url}/v1/score", json={"conversations": CHATS * 100})
        assert many.status_code == 200
