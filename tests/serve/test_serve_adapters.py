"""Several LoRA adapters beside one model: the flag, the list of models, and who answers."""

import json

import httpx2
import pytest
from cyclopts import App
from serve_running import DEFAULTS, running

from folders import write_adapter, write_chat_folder
from internlm2.cli import serve as serve_command
from internlm2.cli.serve import ServeConfig, ServedModelFlags
from internlm2.errors import ConfigError, RequestError

MESSAGES = [{"role": "user", "content": "Hello"}]


def resolved(*adapters: str, **flags) -> ServeConfig:
    return serve_command._resolve(None, ServedModelFlags(adapter=adapters or None, **flags))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, str]:
    """Two that change the model in different ways."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {name: str(write_adapter(folder / name)) for name in ("poet", "lawyer")}
    config = folder / "lawyer" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": -8}))
    return found


def test_the_flag_may_be_repeated_on_the_command_line():
    app = App()
    app.command(serve_command.serve)
    words = ["serve", "demo", "--adapter", "poet=a/b", "--adapter", "lawyer=c=d", "--adapter", "e"]
    _, bound, _ = app.parse_args(words)
    config = serve_command._resolve(None, bound.arguments["flags"])
    assert config.adapters == {"poet": "a/b", "lawyer": "c=d"}
    assert config.adapter == "e"
    assert resolved() == ServeConfig()


def test_a_folder_whose_name_looks_like_a_pair_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert (resolved("a=b").adapter, resolved("a=b").adapters) == ("a=b", {})
    assert resolved("a=c").adapters == {"a": "c"}


def test_a_file_may_hold_them_and_flags_take_their_place(tmp_path):
    path = tmp_path / "serve.toml"
    path.write_text('[adapters]\npoet = "a"\n')
    assert resolved(config=path).adapters == {"poet": "a"}
    assert resolved("lawyer=b", config=path).adapters == {"lawyer": "b"}


def test_names_that_cannot_be_meant_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv(serve_command.KEY_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="gives 'poet' twice"):
        resolved("poet=a", "poet=b")
    with pytest.raises(ConfigError, match=r"gives 'a' and 'b' without names\. Write NAME=FOLDER"):
        resolved("a", "b")
    for name in ("demo", "adapter"):
        with pytest.raises(ConfigError, match=f"An adapter cannot be called '{name}'"):
            serve_command._settings("demo", ServeConfig(adapters={name: "a"}))
    reward = write_chat_folder(tmp_path / "reward", head="reward")
    with pytest.raises(RequestError, match="is a reward model, which takes no adapter"):
        serve_command._load(str(reward), ServeConfig(adapter="a"))


@pytest.mark.parametrize("always", [None, "lawyer"])
def test_the_field_model_chooses_who_answers(chat_folder, adapters, always):
    named = {"poet": adapters["poet"], "law": adapters["lawyer"]}
    config = ServeConfig(
        dtype="float32", quantization="none", memory_gib=0.02, max_model_len=256,
        adapter=None if always is None else adapters[always], adapters=named,
    )  # fmt: skip
    with serve_command._load(str(chat_folder), config) as llm:
        own = serve_command.options.adapter_name(config)
        expected = [llm.chat(MESSAGES, DEFAULTS, adapter=name).text for name in (own, "poet", "law")]
        assert len(set(expected)) == (3 if always is None else 2)  # what is always used is the law's again
        with running(llm, defaults=DEFAULTS, adapter=own) as server:
            client = server.client()
            listed = list(client.models.list())
            assert [model.id for model in listed] == ["tiny", "poet", "law"]
            assert [model.parent for model in listed] == [None, "tiny", "tiny"]
            chat = client.chat.completions
            for name, text in zip(("tiny", "poet", "law"), expected, strict=True):
                got = chat.create(model=name, messages=MESSAGES)
                assert (got.model, got.choices[0].message.content) == (name, text)
            got = httpx2.post(
                f"{server.url}/v1/chat/completions", json={"messages": MESSAGES}, timeout=60
            ).json()
            assert got["choices"][0]["message"]["content"] == expected[0]
            vectors = [
                client.embeddings.create(model=n, input="x").data[0].embedding for n in ("poet", "law")
            ]
            assert vectors[0] != vectors[1]
