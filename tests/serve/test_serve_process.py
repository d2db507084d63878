"""`internlm2 serve` as a process: its flags, its end by signals, its refusals."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from openai import OpenAI

from internlm2.cli import serve as serve_command
from internlm2.cli.serve import ServeConfig

MESSAGES = [{"role": "user", "content": "Hello"}]
COMMAND = [sys.executable, "-m", "internlm2"]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "INTERNLM2_API_KEY"} | {
    "OMP_NUM_THREADS": "1"
}


class Process:
    """A server as a child process. lines: what it wrote to stderr."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.child = subprocess.Popen(
            [*COMMAND, "serve", *map(str, arguments)],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=ENVIRONMENT | environment,
        )
        self.lines: list[str] = []
        self.url = ""
        for line in self.child.stderr:
            self.lines.append(line)
            if line.startswith("Serving "):
                self.url = line.split(" at ")[1].split("/v1")[0]
                break
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.child.stderr), daemon=True)
        self._reader.start()
        end = time.monotonic() + 60
        while self.child.poll() is None and time.monotonic() < end:
            try:
                httpx2.get(f"{self.url}/health")
                return
            except httpx2.TransportError:
                time.sleep(0.05)
        raise AssertionError("".join(self.lines))

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.child.send_signal(number)
        code = self.child.wait(60)
        self._reader.join(10)
        return code


@contextmanager
def process(*arguments: object, **environment: str):
    server = Process(*arguments, **environment)
    try:
        yield server
    finally:
        if server.child.poll() is None:
            server.child.kill()
            server.child.wait()
        server.child.stderr.close()


def test_serve_answers_and_sigterm_lets_answers_finish(chat_folder, tmp_path):
    config = tmp_path / "serve.toml"
    config.write_text('max_tokens = 5\ntemperature = 0.0\nserved_name = "mine"\ndtype = "float32"\n')
    with process(chat_folder, "--port", 0, "--config", config, "--memory-gib", 0.02) as server:
        client = server.client()
        got = client.chat.completions.create(model="mine", messages=MESSAGES)
        assert got.usage.completion_tokens <= 5
        stream = client.chat.completions.create(
            model="mine", messages=MESSAGES, max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        iterator = iter(stream)
        next(iterator)
        server.child.send_signal(signal.SIGTERM)
        chunks = list(iterator)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.child.wait(60) == 0
        server._reader.join(10)
    log = "".join(server.lines)
    assert "Serving mine at http://127.0.0.1:" in log
    assert "POST /v1/chat/completions 200" in log
    assert "Hello" not in log
    assert "Traceback" not in log


def test_ctrl_c_ends_with_130(chat_folder):
    with process(chat_folder, "--port", 0, "--dtype", "float32", "--memory-gib", 0.02) as server:
        assert server.client().models.list().data[0].id == Path(chat_folder).name
        assert server.end(signal.SIGINT) == 130
    assert "Traceback" not in "".join(server.lines)


def test_a_key_of_the_environment_and_one_of_a_file_open(chat_folder, tmp_path):
    keys = tmp_path / "keys"
    made = subprocess.run(
        [*COMMAND, "key", "ann", "--keys", str(keys)],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    ).stdout.strip()
    arguments = (chat_folder, "--port", 0, "--keys", keys, "--host", "0.0.0.0", "--memory-gib", 0.02)
    with process(*arguments, INTERNLM2_API_KEY="from the environment") as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        for key in (made, "from the environment"):
            assert server.client(key).models.list().data
        assert httpx2.get(f"{server.url}/v1/models").status_code == 401
        assert server.end() == 0


def test_a_reward_models_folder_is_served_for_scores(tmp_path):
    from folders import write_chat_folder

    folder = write_chat_folder(tmp_path / "reward", head="reward")
    with process(folder, "--port", 0, "--log-prompts") as server:
        chat = [*MESSAGES, {"role": "assistant", "content": "Hi"}]
        got = httpx2.post(f"{server.url}/v1/score", json={"conversations": [chat]}).json()
        assert isinstance(got["data"][0]["score"], float)
        assert got["model"] == "reward"
        assert server.end() == 0
    assert "Hello" in "".join(server.lines)


def refused(*arguments: object) -> str:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr + done.stdout


def test_what_cannot_be_served_is_refused_before_the_model_is_loaded(chat_folder, tmp_path):
    assert "no key is asked for" in refused("serve", chat_folder, "--host", "0.0.0.0")
    assert "Cannot read the keys" in refused("serve", chat_folder, "--keys", tmp_path / "none")
    assert "port is 99999" in refused("serve", chat_folder, "--port", 99999)
    config = tmp_path / "serve.toml"
    config.write_text("max_quue = 3\n")
    assert "Did you mean 'max_queue'?" in refused("serve", chat_folder, "--config", config)
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"Cannot listen on 127.0.0.1:{port}" in refused("serve", chat_folder, "--port", port)


@pytest.mark.parametrize("command", ["serve", "key"])
def test_help_is_quick_and_imports_nothing_heavy(command):
    code = (
        "import sys; from internlm2.cli.main import run; run([sys.argv[1], '--help']); "
        "print([m for m in ('torch', 'fastapi', 'uvicorn') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_the_extra_one_sentence_says_what_to_install(chat_folder):
    code = (
        "import sys; sys.modules['fastapi'] = None; from internlm2.cli.main import run; "
        "sys.exit(run(['serve', sys.argv[1], '--port', '0']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(chat_folder)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'internlm2[serve]'" in done.stderr


def test_how_many_answers_run_at_once_is_the_engines_and_the_gates_number(chat_folder):
    config = ServeConfig(max_running=3, dtype="float32")
    assert serve_command._settings("demo", config).max_running == 3
    with serve_command._load(str(chat_folder), config) as llm:
        assert llm.frontend.engine.scheduler.max_num_seqs == 3
