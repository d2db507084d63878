"""A split model whose other processes do not come up: told at once, Ctrl-C ends the wait, and nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from internlm2 import LLM, SamplingParams
from internlm2.checkpoint.formats.official import OfficialCheckpoint
from internlm2.engine.worker_process import Child, WorkerSettings
from internlm2.engine.workers import Workers
from internlm2.errors import RequestError

OPTIONS = {"dtype": "float32", "device": "cpu", "rope_mode": "stateless"}

# What a worker does instead of loading its part: python imports `sitecustomize` when it starts.
INSTEAD_OF_LOADING = """\
import sys
if any('"rank"' in word for word in sys.orig_argv):
    import os, pathlib, time
    import internlm2.checkpoint.load as load
    def instead(*args, **options):
        {body}
    load.load_checkpoint = instead
"""


@pytest.fixture(autouse=True)
def threads():
    """A split model shares the processor out; what runs next gets it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def started(monkeypatch):
    """The processes that were started; none may be left."""
    children: list[Child] = []

    class Recorded(Child):
        def __init__(self, settings):
            super().__init__(settings)
            children.append(self)

    monkeypatch.setattr("internlm2.engine.workers.Child", Recorded)
    yield children
    assert [child.process.poll() for child in children if child.process.poll() is None] == []


def script(folder: Path, text: str) -> str:
    """A program that takes the place of python."""
    path = folder / "python.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(("text", "message"), [
    ("kill -9 $$", r"rank 1 was killed by signal 9 \(SIGKILL: .*memory runs out\)\. Mend that"),
    ("echo broken >&2; exit 4", r"rank 1 ended with exit code 4\. Its last line was: broken\. Mend that"),
    ("exit 0", r"rank 1 ended with exit code 0\. Mend that"),
    ("echo 'internlm2-worker: READY'; sleep 0.3; echo so near; exit 5", "exit code 5. Its last line was: so near"),
])  # fmt: skip
def test_a_process_that_ends_at_start_is_told_at_once(chat_folder, tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(sys, "executable", script(tmp_path, text))
    began = time.monotonic()
    with pytest.raises(RequestError, match=f"split over 2 processes could not be loaded: .*{message}"):
        LLM(chat_folder, dtype="float32", tensor_parallel=2)
    assert time.monotonic() - began < 5


def test_an_import_that_fails_in_another_process_is_told(chat_folder, tmp_path, monkeypatch, started):
    (tmp_path / "sentencepiece.py").write_text("raise ImportError('libmissing.so: no such file')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(RequestError, match=r"exit code 1\. Its last line was: ImportError: libmissing\.so"):
        LLM(chat_folder, dtype="float32", tensor_parallel=2)


def test_the_current_folder_is_not_searched_for_packages(chat_folder, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    llm = LLM(chat_folder, dtype="float32", tensor_parallel=2)
    llm.close()


def test_a_process_that_ends_while_all_load_is_told_and_another_try_works(
    chat_folder, tmp_path, monkeypatch, started
):
    (tmp_path / "sitecustomize.py").write_text(
        INSTEAD_OF_LOADING.format(body="time.sleep(0.5); print('no memory left'); os._exit(7)")
    )
    with monkeypatch.context() as patched:
        patched.setattr(sys, "path", [str(tmp_path), *sys.path])
        with pytest.raises(RequestError, match=r"could not be loaded: .* code 7\. .* no memory left\. Mend"):
            LLM(chat_folder, dtype="float32", tensor_parallel=2)
    again = LLM(chat_folder, dtype="float32", tensor_parallel=2)
    assert again.generate(["x"], SamplingParams(max_tokens=2, ignore_eos=True))
    again.close()


def test_rank_0_reads_no_further_once_another_process_has_ended(chat_folder, monkeypatch, started):
    num_read = 0
    watch, read = Workers.watch, OfficialCheckpoint.read

    def losing(self, checkpoint):
        self.children[0].process.kill()
        return watch(self, checkpoint)

    def counting(self, name):
        nonlocal num_read
        num_read += 1
        time.sleep(0.3)
        return read(self, name)

    monkeypatch.setattr(Workers, "watch", losing)
    monkeypatch.setattr(OfficialCheckpoint, "read", counting)
    with pytest.raises(RequestError, match="could not be loaded: the process of rank 1 was killed"):
        LLM(chat_folder, dtype="float32", tensor_parallel=2)
    assert num_read <= 2


def test_the_others_are_ended_when_one_ends(chat_folder, tmp_path, monkeypatch, started):
    text = 'case "$*" in *\'"rank": 2\'*) exit 6;; esac; exec sleep 600'
    monkeypatch.setattr(sys, "executable", script(tmp_path, text))
    with pytest.raises(RequestError, match=r"split over 4 processes .* rank 2 ended with exit code 6"):
        Workers(str(chat_folder), size=4, **OPTIONS)
    assert [child.process.returncode for child in started] == [-signal.SIGKILL, 6, -signal.SIGKILL]


def test_the_one_that_ended_first_is_named(tmp_path, monkeypatch):
    text = 'case "$*" in *\'"rank": 1\'*) sleep 0.3; echo follows; exit 1;; esac; echo cause; exit 2'
    monkeypatch.setattr(sys, "executable", script(tmp_path, text))
    facts = {"path": "", "size": 3, "address": "", "num_threads": 1, **OPTIONS}
    workers = Workers.__new__(Workers)
    workers.children = [Child(WorkerSettings(rank=rank, **facts)) for rank in (1, 2)]
    for child in workers.children:
        child.process.wait()
    assert "rank 2 ended with exit code 2. Its last line was: cause." in workers.explain(RequestError("x"))
    assert workers.explain(ValueError("of ours")) == "ValueError: of ours."


def test_what_never_starts_is_given_up(chat_folder, tmp_path, monkeypatch, started):
    monkeypatch.setattr("internlm2.engine.workers.START_SECONDS", 0.3)
    monkeypatch.setattr(sys, "executable", script(tmp_path, "exec sleep 600"))
    with pytest.raises(RequestError, match=r"did not start within 0\.3 s\. Is the machine overloaded\?"):
        LLM(chat_folder, dtype="float32", tensor_parallel=2)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RequestError, match="Cannot start a process of a split model with /nowhere/python"):
        LLM(chat_folder, dtype="float32", tensor_parallel=2)


LOADING = "pathlib.Path({pid!r}).write_text(str(os.getpid())); time.sleep(600)"


@pytest.mark.parametrize(("is_loading", "number"), [
    (False, signal.SIGINT), (True, signal.SIGINT), (True, signal.SIGKILL),
])  # fmt: skip
def test_ctrl_c_and_the_end_of_rank_0_end_all(chat_folder, tmp_path, is_loading, number):
    pid_file = tmp_path / "pid"
    if is_loading:
        body = LOADING.format(pid=str(pid_file))
        (tmp_path / "sitecustomize.py").write_text(INSTEAD_OF_LOADING.format(body=body))
        change = f"sys.path.insert(0, {str(tmp_path)!r})"
    else:
        fake = script(tmp_path, f"echo $$ > {pid_file}; exec sleep 600")
        change = f"sys.executable = {fake!r}"
    code = f"""if True:
        import sys
        from internlm2 import LLM
        {change}
        LLM({str(chat_folder)!r}, dtype="float32", tensor_parallel=2)
    """
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as program:
        for _ in range(600):
            if pid_file.exists() and pid_file.read_text().strip():
                break
            assert program.poll() is None, program.stdout.read()
            time.sleep(0.1)
        pid = int(pid_file.read_text())
        time.sleep(0.3)
        assert is_running(pid)
        began = time.monotonic()
        program.send_signal(number)
        program.wait(20)
        assert time.monotonic() - began < 10  # on a busy machine; it is about 1 s
        last_line = program.stdout.read().strip().rpartition("\n")[2]
        assert last_line.endswith("KeyboardInterrupt" if number == signal.SIGINT else "")
    for _ in range(100):
        if not is_running(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("a process outlived its rank 0")
