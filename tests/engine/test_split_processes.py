"""The processes of a split model: what they can hold, and that they never outlive who started them.

Apart from test_split.py: a process is in one group at a time.
"""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from folders import write_chat_folder
from internlm2 import LLM, SamplingParams
from internlm2.engine.build import PAGE_SIZE
from internlm2.engine.reward import RewardScorer
from internlm2.errors import ConfigError, RequestError


@pytest.fixture(autouse=True)
def threads():
    """A split model shares the processor out; what runs next gets it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def processes(llm: LLM) -> list["subprocess.Popen[bytes]"]:
    workers = llm._close.peek()[1].__self__
    return [child.process for child in workers.children]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_pages_move_to_host_memory_and_int8_in_every_process(chat_folder):
    page_bytes = (
        PAGE_SIZE * 2 * 2 * 2 * (16 + 4)
    )  # two layers, keys and values, two heads of 16 and their scales
    few = {"memory_gib": 12 * page_bytes / 2**30, "host_memory_gib": 100 * page_bytes / 2**30}
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    prompts = [[1, *range(start, start + 70)] for start in (10, 50, 90, 10, 50, 90)]
    found = []
    for size in (1, 2):
        llm = LLM(
            chat_folder,
            dtype="float32",
            kv_dtype="int8",
            max_model_len=90,
            tensor_parallel=size,
            memory_gib=few["memory_gib"] / size,
            host_memory_gib=few["host_memory_gib"] / size,
        )
        outs = [llm.generate([prompt], params)[0] for prompt in prompts]
        found.append([out.token_ids for out in outs])
        # The second time they come back from host memory.
        assert [out.num_cached_tokens > 0 for out in outs] == [False] * 3 + [True] * 3
        llm.close()
    assert found[0] == found[1]


def test_reward_models_split_too(tmp_path):
    folder = write_chat_folder(tmp_path, head="reward")
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}] for text in "ab"]
    expected = RewardScorer(folder, dtype="float32").scores(chats)
    scorer = RewardScorer(folder, dtype="float32", tensor_parallel=2)
    assert scorer.scores(chats) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    scorer.close()


def test_closing_ends_the_processes_and_allows_another(chat_folder):
    llm = LLM(chat_folder, dtype="float32", tensor_parallel=2)
    pids = [process.pid for process in processes(llm)]
    assert len(pids) == 1
    assert is_running(pids[0])
    llm.close()
    llm.close()
    assert not is_running(pids[0])
    with pytest.raises(RequestError, match="closed"):
        llm.generate(["x"], SamplingParams(max_tokens=2))
    dropped = LLM(chat_folder, dtype="float32", tensor_parallel=2)
    [worker] = processes(dropped)
    del dropped
    gc.collect()
    assert worker.poll() is not None


def test_a_lost_process_is_told_and_told_again(chat_folder):
    llm = LLM(chat_folder, dtype="float32", tensor_parallel=2)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    llm.generate(["x"], params)
    for process in processes(llm):
        process.kill()
        process.wait()
    for _ in range(3):
        with pytest.raises(RequestError, match=r"split over 2 processes cannot go on: .* signal 9") as told:
            llm.generate(["y"], params)
        assert str(told.value).count("cannot go on") == str(told.value).count("again") == 1
    again = LLM(chat_folder, dtype="float32", tensor_parallel=2)  # what the message says
    assert again.generate(["y"], params)
    again.close()
    llm.close()


def test_a_fork_refuses_and_leaves_the_processes_alone(chat_folder):
    code = f"""if True:
        import os
        from internlm2 import LLM, SamplingParams
        from internlm2.errors import RequestError
        llm = LLM({str(chat_folder)!r}, dtype="float32", tensor_parallel=2)
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        before = llm.generate(["x"], params)
        pid = os.fork()
        if pid == 0:
            try:
                llm.generate(["x"], params)
            except RequestError as error:
                print(error, flush=True)
            llm.close()
            os._exit(0)  # as multiprocessing does
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        print(llm.generate(["x"], params) == before)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    refusal, answer = done.stdout.splitlines()
    assert "fork" in refusal
    assert answer == "True"


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit", "1 / 0"])
def test_no_process_stays_when_its_caller_ends(chat_folder, ending):
    code = f"""if True:
        import os, signal
        from internlm2 import LLM, SamplingParams
        llm = LLM({str(chat_folder)!r}, dtype="float32", tensor_parallel=2)
        print(llm.generate(["x"], SamplingParams(max_tokens=2))[0].finish_reason)
        print(*[c.process.pid for c in llm._close.peek()[1].__self__.children], flush=True)
        {ending}
    """
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    pid = int(done.stdout.split()[-1])
    assert done.returncode == {"o": -signal.SIGKILL, "r": 0, "1": 1}[ending[0]], done.stderr
    assert done.stderr.count("Traceback") == (ending[0] == "1")
    for _ in range(200):
        if not is_running(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker outlived its caller")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 0}, "at least 1"),
        ({"tensor_parallel": 2, "deterministic": True}, "deterministic"),
        ({"tensor_parallel": 2, "adapters": {"a": "b"}}, "adapters"),
        ({"tensor_parallel": 2, "speculative": "draft"}, "draft model"),
        ({"tensor_parallel": 3}, "2 key/value heads"),
    ],
)
def test_what_cannot_be_split_is_refused_before_anything_starts(chat_folder, options, message):
    with pytest.raises((RequestError, ConfigError), match=message):
        LLM(chat_folder, **options)
