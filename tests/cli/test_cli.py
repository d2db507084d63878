"""The command line as a user meets it: in a process of its own, with exit codes and without tracebacks."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import COMMAND, refuse, run

from folders import write_adapter, write_chat_folder
from goldens import golden_folder
from internlm2.cli import main as cli
from internlm2.cli.options import RunFlags, resolve
from internlm2.errors import ConfigError

ALL_COMMANDS = [
    [], ["chat"], ["generate"], ["bench"], ["doctor"], ["model"], ["model", "download"], ["model", "info"],
    ["model", "convert"], ["model", "export"], ["eval"], ["eval", "prompt"], ["eval", "data"],
]  # fmt: skip


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=" ".join)
def test_help_is_there_and_imports_no_torch(words):
    code = (
        "import sys; from internlm2.cli.main import run; rc = run(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); print(heavy, file=sys.stderr);"
        "sys.exit(rc or len(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: internlm2" in done.stdout


def test_version():
    assert run("--version").stdout.strip() == "internlm2 0.1.0"


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("Unknown option: --bogus", ["generate", "demo", "x", "--bogus", "1"]),
        ("Unknown command", ["generat"]),
        ("there is no such folder or file", ["generate", "nowhere", "x"]),
        ("there is no such folder or file", ["model", "info", "nowhere"]),
        ("dtype is 'int3'", ["generate", "demo", "x", "--dtype", "int3"]),
        ("temperature is -1.0", ["generate", "demo", "x", "--temperature", "-1"]),
        ("No prompt. Write it after the model", ["generate", "demo"]),
        ("Invalid value", ["generate", "demo", "x", "--max-tokens", "many"]),
        ("threads is 100000", ["generate", "demo", "x", "--threads", "100000"]),
        ("threads is -1", ["generate", "demo", "x", "--threads", "-1"]),
        ("device is 'meta'", ["generate", "demo", "x", "--device", "meta"]),
        ("Invalid value for --max-model-len", ["generate", "demo", "x", "--max-model-len", "long"]),
        ("no such folder", ["generate", "demo", "x", "--speculative", "nowhere"]),
        ("no adapter_config.json", ["generate", "demo", "x", "--adapter", "nowhere"]),
        ("tensor_parallel is 0", ["generate", "demo", "x", "--tensor-parallel", "0"]),
        ("does not go with speculative", ["generate", "demo", "x", "--deterministic", "--speculative", "lookup"]),
        ("Leave --adapter off", ["bench", "demo", "--adapter", "x"]),
        ("context is -5", ["model", "info", "7b", "--context", "-5"]),
        ("dtype is 'int3'", ["model", "info", "7b", "--dtype", "int3"]),
        ("kv_dtype is 'int3'", ["model", "info", "7b", "--kv-dtype", "int3"]),
        ("num_sequences is 0", ["model", "info", "7b", "--num-sequences", "0"]),
        ("device is 'meta'", ["model", "info", "7b", "--device", "meta"]),
        ("there is no such folder or file", ["model", "info", "~nobody-here/x"]),
        ("there is no such folder or file", ["model", "info", "x" * 300]),
        ("No configuration file none.toml", ["generate", "demo", "x", "--config", "none.toml"]),
        ("exists already", ["model", "convert", golden_folder("gqa"), golden_folder("mha")]),
        ("is here already. `download` takes a Hugging Face id", ["model", "download", golden_folder("gqa")]),
        ("is no .gguf name", ["model", "export", golden_folder("gqa"), "x.bin", "--to", "gguf"]),
        ("q8_0 is a GGUF type", ["model", "export", golden_folder("gqa"), "x", "--to", "llama", "--dtype", "q8_0"]),
        ("internevo shards keep the dtype", ["model", "export", golden_folder("gqa"), "x", "--to", "internevo", "--dtype", "float16"]),
    ],
)  # fmt: skip
def test_mistakes_are_explained_with_exit_code_2(message, arguments):
    refuse(message, *arguments)


def test_a_reward_model_is_not_asked_to_talk(tmp_path, chat_folder):
    copy = tmp_path / "reward"
    shutil.copytree(golden_folder("reward"), copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(chat_folder / name, copy)
    refuse("has a reward head, but generating text needs CausalLM", "generate", copy, "x")


def test_weights_without_a_tokenizer_are_explained():
    refuse("No tokenizer", "generate", golden_folder("gqa"), "x")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    folder = write_chat_folder(tmp_path / "small", vocab_size=200)
    refuse("the tokenizer has 261 tokens, but the embedding has 200 rows", "generate", folder, "x")


def test_an_unknown_config_key_is_refused_with_a_suggestion(tmp_path):
    (tmp_path / "a.toml").write_text("max_token = 3\n")
    refuse(
        "unknown key 'max_token'. Did you mean 'max_tokens'?",
        "generate",
        "demo",
        "x",
        "--config",
        tmp_path / "a.toml",
    )


@pytest.mark.parametrize("length", [300, "auto"])
def test_a_length_is_a_number_or_a_word(tmp_path, length):
    path = tmp_path / "a.toml"
    path.write_text(f"max_model_len = {length!r}\n")
    assert resolve(RunFlags(config=path)).max_model_len == length
    assert resolve(RunFlags(max_model_len=length)).max_model_len == length


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('max_tokens = 3\ntemperature = 0\nstop = ["x", "y"]\n')
    config = resolve(RunFlags(config=path, max_tokens=7))
    assert (config.max_tokens, config.temperature, config.stop, config.top_p) == (7, 0.0, ("x", "y"), 0.8)


@pytest.mark.parametrize(
    ("text", "message"),
    [("max_tokens = 1.5", "key 'max_tokens' is 1.5, but must be a whole number"), ("dtype = 3", "must be a text"),
     ("seed = true", "'seed'"), ("a = [", "is not valid TOML"),
     ('max_model_len = "all"', "is 'all', but must be a whole number or 'auto'"),
     ("max_model_len = true", "is True, but must be a whole number or 'auto'")],
)  # fmt: skip
def test_wrong_types_in_a_file_are_refused(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve(RunFlags(config=tmp_path / "a.toml"))


def test_a_bug_of_ours_is_exit_code_1_with_a_traceback():
    code = (
        "from internlm2.cli import main, generate; import internlm2.cli.options as o\n"
        "def broken(*a): raise AssertionError('ours')\n"
        "o.resolve = broken\nmain.main(['generate', 'demo', 'x'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


class TestGenerate:
    def test_json_holds_the_answer_and_the_counts(self, chat_folder):
        done = run("generate", chat_folder, "Hello", "--json", "--max-tokens", "5", "--seed", "1")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["num_tokens"] <= 5
        assert set(answer) >= {"text", "finish_reason", "num_prompt_tokens", "tokens_per_second"}

    def test_a_prompt_comes_from_a_pipe(self, chat_folder):
        piped = run("generate", chat_folder, "--max-tokens", "5", "--temperature", "0", stdin="Hello")
        given = run("generate", chat_folder, "Hello", "--max-tokens", "5", "--temperature", "0")
        assert piped.returncode == 0
        assert piped.stdout == given.stdout
        assert "tokens/s" in given.stderr

    def test_ways_to_run_change_no_answer(self, chat_folder):
        common = ("generate", chat_folder, "Hello Hello Hello", "--max-tokens", "12", "--dtype", "float32")
        common += ("--temperature", "0")
        plain = run(*common)
        ways = (
            ("--speculative", "lookup"),
            ("--deterministic",),
            ("--tensor-parallel", "2"),
            ("--max-model-len", "auto", "--memory-gib", "0.01"),
        )
        for way in ways:
            done = run(*common, *way)
            assert done.returncode == 0, done.stderr
            assert done.stdout == plain.stdout, way

    def test_an_adapter_is_used(self, chat_folder, tmp_path):
        write_adapter(tmp_path / "lora")
        common = ("generate", chat_folder, "Hello", "--max-tokens", "12", "--temperature", "0")
        with_adapter = run(*common, "--adapter", tmp_path / "lora")
        assert with_adapter.returncode == 0, with_adapter.stderr
        assert with_adapter.stdout != run(*common).stdout

    def test_reading_a_long_prompt_shows_progress(self, chat_folder):
        slow = (
            "import sys; from internlm2.engine.compute.runner import Runner; from internlm2.cli.main import main\n"
            "import time; forward = Runner.forward\n"
            "Runner.forward = lambda *a: (time.sleep(0.5), forward(*a))[1]\n"
            "main(sys.argv[1:])"
        )
        arguments = [sys.executable, "-c", slow, "generate", str(chat_folder), "--max-tokens", "3"]
        done = subprocess.run(arguments, input="x" * 5000, capture_output=True, text=True, check=True)
        assert "Reading the prompt: 50%" in done.stderr
        short = subprocess.run([*arguments, "Hello"], capture_output=True, text=True, check=True)
        assert "Reading" not in short.stderr

    def test_a_reader_that_leaves_early_is_no_error(self, chat_folder):
        command = f"{' '.join(COMMAND)} generate {chat_folder} Hello --max-tokens 50 | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "0"
        assert "Traceback" not in done.stderr


# Drawn tokens may end an answer before it is interrupted; the best ones of this model go on for thousands.
ENDLESS = ("--temperature", "0", "--max-tokens", "100000", "--max-model-len", "200000")


class TestChat:
    def test_piped_lines_are_turns_and_commands(self, chat_folder, tmp_path):
        script = f"Hello\n/system Be brief.\nAgain\n/save {tmp_path / 'talk.json'}\n/nonsense\n/help\n/quit\nnever read\n"
        done = run("chat", chat_folder, "--max-tokens", "4", stdin=script)
        assert done.returncode == 0, done.stderr
        talk = json.loads((tmp_path / "talk.json").read_text())
        assert [m["role"] for m in talk] == ["system", "user", "assistant"]
        assert talk[0]["content"] == "Be brief."
        assert talk[1]["content"] == "Again"
        assert "No command /nonsense" in done.stderr
        assert "forget the conversation" in done.stderr

    def test_save_never_overwrites(self, chat_folder, tmp_path):
        (tmp_path / "mine").write_text("keep")
        bad = f"/save ~nobody-here/x\n/save {tmp_path}\n/save {tmp_path / ('x' * 300)}\n"
        done = run("chat", chat_folder, stdin=f"/save {tmp_path / 'mine'}\n/save\n{bad}")
        assert done.returncode == 0
        assert "is a folder" in done.stderr
        assert "File name too long" in done.stderr
        assert "exists already" in done.stderr
        assert "Give a file name" in done.stderr
        assert (tmp_path / "mine").read_text() == "keep"

    def test_reset_forgets_and_keeps_the_system_message(self, chat_folder, tmp_path):
        script = f"One\n/reset\n/save {tmp_path / 'talk.json'}\n"
        run("chat", chat_folder, "--system", "S", "--max-tokens", "2", stdin=script)
        assert json.loads((tmp_path / "talk.json").read_text()) == [{"role": "system", "content": "S"}]

    def test_a_message_too_long_is_refused_and_the_talk_goes_on(self, chat_folder, tmp_path):
        script = f"{'word ' * 300}\nHi\n/save {tmp_path / 'talk.json'}\n"
        done = run("chat", chat_folder, "--max-model-len", "60", "--max-tokens", "3", stdin=script)
        assert "this model takes 60 with the answer" in done.stderr
        assert done.returncode == 2  # a script should know that a line was refused
        assert [m["role"] for m in json.loads((tmp_path / "talk.json").read_text())] == ["user", "assistant"]

    def test_ctrl_c_stops_the_answer_and_not_the_program(self, chat_folder):
        terminal, child = pty.openpty()
        process = subprocess.Popen(
            [*COMMAND, "chat", str(chat_folder), *ENDLESS],
            stdin=child, stdout=child, stderr=child, start_new_session=True, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(child)
        try:
            screen = Screen(terminal)
            screen.wait_for("> ")
            os.write(terminal, b"Hello\n")
            screen.wait_for("Hello\r\n")
            screen.wait_for("", num_more=5)  # the answer has begun
            process.send_signal(signal.SIGINT)
            screen.wait_for("(stopped)")
            screen.wait_for("> ")
            for _ in range(20):  # one that comes before readline waits is only seen with the next key
                process.send_signal(signal.SIGINT)
                if screen.sees("/quit leaves", within_seconds=3):
                    break
            os.write(terminal, b"/quit\n")
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            os.close(terminal)

    def test_ctrl_c_in_generate_is_exit_code_130(self, chat_folder):
        process = subprocess.Popen(
            [*COMMAND, "generate", str(chat_folder), "Hello", *ENDLESS],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Interrupted." in errors
        assert "Traceback" not in errors


class Screen:
    """What a program writes to a terminal, read until something appears."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._unread = ""

    def wait_for(self, text: str, *, num_more: int = 0) -> None:
        assert self.sees(text, num_more=num_more), f"never saw {text!r}, but {self._unread[-500:]!r}"

    def sees(self, text: str, *, num_more: int = 0, within_seconds: float = 120) -> bool:
        end = time.monotonic() + within_seconds
        while text not in self._unread or len(self._unread) < num_more:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return False
            self._unread += os.read(self._terminal, 4096).decode(errors="replace")
        self._unread = self._unread[self._unread.index(text) + len(text) :]
        return True


class TestModel:
    def test_info_counts_what_a_model_needs(self):
        done = run("model", "info", "7b", "--json", "--context", "1000000")
        data = json.loads(done.stdout)
        assert data["parameters"]["total"] == 7_737_708_544
        assert data["parameters"]["non_embedding"] == 6_979_588_096
        assert data["weight_bytes"]["bfloat16"] == 2 * 7_737_708_544
        assert data["kv_cache_bytes"]["bfloat16"]["4096"] == 131_072 * 4096
        assert data["kv_cache_bytes"]["int8"]["1000000"] == (65_536 + 2_048) * 1_000_000  # with its scales
        assert data["plan"]["kv_bytes"] == 131_072 * 1_000_000

    def test_info_plans_a_context(self):
        done = run(
            "model", "info", "7b", "--context", "200000", "--kv-dtype", "int8", "--num-sequences", "2",
            "--dtype", "float32", "--device", "cpu",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for text in (
            "Plan: 2 sequences of 200,000 tokens, float32, keys and values int8",
            "25.18 GiB",
            "PFLOP",
        ):
            assert text in done.stdout

    def test_info_reads_only_headers_and_prints_a_table(self):
        done = run("model", "info", golden_folder("dynamic-ntk"))
        assert done.returncode == 0
        for text in ("dynamic scaling, factor 2", "KV 200,000", "bfloat16", "parameters"):
            assert text in done.stdout

    def test_convert_writes_an_official_folder(self, tmp_path):
        done = run("model", "convert", golden_folder("six-groups"), tmp_path / "out", "--dtype", "bfloat16")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(tmp_path / "out")
        assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"

    def test_export_and_convert_are_inverse(self, tmp_path):
        for to, name in (("llama", "llama"), ("gguf", "model.gguf"), ("internevo", "shards")):
            exported = tmp_path / name
            done = run("model", "export", golden_folder("gqa"), exported, "--to", to)
            assert done.returncode == 0, done.stderr
            assert run("model", "convert", exported, tmp_path / f"{to}-back").returncode == 0


def test_run_returns_the_exit_code_of_a_command(monkeypatch):
    assert cli.run(["--version"]) == 0
    assert cli.run(["nonsense"]) == 2


def test_the_source_tree_names_no_path_of_a_machine():
    root = Path(cli.__file__).parents[3]
    assert not [p for p in root.rglob("src/**/*.py") if "/home/" in p.read_text(encoding="utf-8")]


class TestStreams:
    """Closed pipes, full disks and strange encodings end in a sentence, not in a traceback."""

    @pytest.mark.parametrize(
        ("command", "code"),
        [
            ("internlm2 model info 7b >&-", 0),
            ("internlm2 generate demo <&-", 2),
            ("internlm2 model info 7b >/dev/full", 2),
            ("internlm2 --help | head -1; exit ${{PIPESTATUS[0]}}", 0),
            ("XDG_CACHE_HOME=/proc/x internlm2 model info demo", 2),
            ("printf 'caf\\xe9' | PYTHONIOENCODING=utf-8:strict internlm2 model info 7b", 0),
            (
                "printf 'caf\\xe9' | PYTHONIOENCODING=utf-8:strict internlm2 generate {folder} --max-tokens 1",
                0,
            ),
            ("PYTHONIOENCODING=ascii internlm2 generate {folder} '说😀' --max-tokens 3", 0),
        ],
    )
    def test_streams(self, command, code, chat_folder):
        line = command.format(folder=chat_folder).replace("internlm2 ", f"{sys.executable} -m internlm2 ", 1)
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        assert done.returncode == code, done.stderr

    def test_a_folder_called_demo_does_not_hide_the_model(self, tmp_path, demo):
        (tmp_path / "demo").mkdir()
        done = subprocess.run(
            [*COMMAND, "model", "info", "demo"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
