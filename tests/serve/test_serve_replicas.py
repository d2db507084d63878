"""Two replicas behind one address: both answer, one may die, nothing stays behind. Needs the `ray` extra."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from openai import APIError, OpenAI

pytest.importorskip("ray.serve", reason="pip install 'internlm2[ray]'", exc_type=ImportError)

pytestmark = pytest.mark.slow
MESSAGES = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def served(chat_folder, tmp_path_factory):
    """Address, process and log of a server with two replicas of a tiny model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("replicas") / "log"
    command = [
        sys.executable, "-m", "internlm2", "serve", str(chat_folder), "--replicas", "2", "--port", str(port), "--threads",
        "1", "--served-name", "tiny",
    ]  # fmt: skip
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: "Serving 2 x tiny" in log.read_text(), process)
        yield url, process, log
        process.terminate()
        assert process.wait(120) == 0, log.read_text()[-3000:]
        assert not replica_ids(), "a process of Ray's outlived its caller"
    finally:
        process.kill()


def wait_for(condition, process: "subprocess.Popen[bytes] | None" = None, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        assert process is None or process.poll() is None, "the server is gone"
        time.sleep(0.2)


def replica_ids() -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::ServeReplica:internlm2"):
            found.append(int(folder.name))
    return found


def chat(url: str, messages: list[dict[str, str]]):
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, temperature=0)


def ask(url: str, num_tokens: int) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=num_tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].message.content


def counted(url: str, name: str = "internlm2_output_tokens_total") -> set[str]:
    """A counter of each replica: every question of the counters goes to one or the other."""
    texts = [httpx2.get(f"{url}/metrics", timeout=30).text for _ in range(20)]
    return {line for text in texts for line in text.splitlines() if line.startswith(name)}


def test_both_replicas_answer_the_same(served):
    url, _, _ = served
    assert len(replica_ids()) == 2
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(url, 20), range(16)))
    assert len(set(answers)) == 1
    assert len(counted(url)) == 2
    assert all(float(line.split()[-1]) >= 20 for line in counted(url))


def test_streams_come_in_pieces_and_errors_keep_their_shape(served):
    url, _, _ = served
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    pieces = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=20,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    )
    assert len(pieces) > 5
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == ask(url, 20)
    with pytest.raises(APIError, match="Did you mean 'max_tokens'"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"max_token": 3})


def test_turns_of_a_conversation_find_their_prefix_and_conversations_use_both_replicas(served):
    url, _, _ = served
    before = counted(url, "internlm2_prompt_tokens_total")
    conversations = [[{"role": "user", "content": f"{index}: {'a long story ' * 8}"}] for index in range(12)]
    for _ in range(2):
        for messages in conversations:
            answer = chat(url, messages)
            if len(messages) > 1:
                assert answer.usage.prompt_tokens_details.cached_tokens > 90
            text = answer.choices[0].message.content
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
    after = counted(url, "internlm2_prompt_tokens_total")
    assert len(after) == 2
    assert after.isdisjoint(before)


def test_a_client_that_leaves_ends_its_answer(served):
    url, _, _ = served
    body = {"messages": MESSAGES, "max_tokens": 400, "ignore_eos": True}
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=0.05)

    def is_idle() -> bool:
        texts = [httpx2.get(f"{url}/metrics", timeout=30).text for _ in range(10)]
        return all(
            "internlm2_open_answers 0.0" in text and "internlm2_pages_held 0.0" in text for text in texts
        )

    wait_for(is_idle, seconds=60)


def test_a_replica_that_is_killed_costs_its_answers_and_no_others(served):
    url, process, _ = served
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, url, 60) for _ in range(24)]
        time.sleep(0.3)
        os.kill(replica_ids()[0], signal.SIGKILL)
        results = [each.exception() for each in asked]
    assert all(error is None or isinstance(error, APIError) for error in results)
    assert sum(error is None for error in results) >= 8
    assert ask(url, 5)
    wait_for(lambda: len(replica_ids()) == 2, process)
