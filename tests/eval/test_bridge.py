"""Our engine as a model of lm-evaluation-harness, against the harness's own `hf` model on the same folder."""

import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the harness asks the hub for the commit of a model folder

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import internlm2
from folders import write_chat_folder
from internlm2.cli.main import run as command
from internlm2.errors import ConfigError, MissingDependencyError, RequestError
from internlm2.eval import bridge
from internlm2.eval.bridge import InternLM2

LONG = "Beyond the window there is more text than the model is given at once. " * 4
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "Nobody."},
    {"role": "user", "content": "And <|im_end|> now?"},
]


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, own, 0, ("task", n, 1)) for n, own in enumerate(arguments)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model that writes printable ASCII, so that answers can be compared as text.

    NOTE: `hf` may also write ids that the tokenizer has not, half characters, and text behind `<|im_end|>`.
    """
    path = write_chat_folder(tmp_path_factory.mktemp("bridge") / "model", vocab_size=261)
    (weights,) = path.glob("*.safetensors")
    tensors = load_file(weights)
    table = internlm2.Tokenizer.from_pretrained(path).token_bytes
    unwanted = [i for i, one in enumerate(table) if len(one) != 1 or not 32 <= one[0] < 127]
    tensors["output.weight"][unwanted] = 0.0
    save_file(tensors, weights, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def ours(folder) -> InternLM2:
    torch.set_num_threads(1)
    return InternLM2(str(folder), dtype="float32", device="cpu", max_length=128)


@pytest.fixture(scope="module")
def theirs(folder) -> HFLM:
    """transformers behind the harness's own code."""
    import internlm2.hf  # noqa: F401 - makes the Auto classes know the folder

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", max_length=128, batch_size=1)


PAIRS = [
    ("The capital of France is", " Paris"),
    ("a trailing space ", "goes to the continuation"),
    ("", "no context at all"),
    ("<s>the start is there", " already"),
    ("<|im_start|>user\nhello<|im_end|>\n", "markers are markers"),
    ("mehrere  \n\n ", "\tKontexte 你好"),
    (LONG, "is cut from the left"),
    ("x", "y"),
    ("x", "z"),
]


def test_loglikelihoods_are_those_of_the_hf_model(ours, theirs):
    ours_found = ours.loglikelihood(instances("loglikelihood", *PAIRS))
    theirs_found = theirs.loglikelihood(instances("loglikelihood", *PAIRS))
    for pair, (value, is_greedy), (expected, expected_greedy) in zip(
        PAIRS, ours_found, theirs_found, strict=True
    ):
        assert value == pytest.approx(expected, abs=1e-3), pair
        assert is_greedy == expected_greedy, pair
    assert len({round(value, 3) for value, _ in ours_found}) == len(PAIRS), "the pairs tell texts apart"


def test_what_the_model_would_write_itself_is_greedy(ours, theirs):
    context = "Once upon a time"
    text = ours.generate_until(instances("generate_until", (context, {"max_gen_toks": 3})))[0]
    ids = ours.tok_encode(text, add_special_tokens=False)
    requests = [
        ((context, text), ours.tok_encode(context), ids),
        ((context, "no"), ours.tok_encode(context), [9, 8]),
    ]
    assert [one for _, one in ours._loglikelihood_tokens(requests)] == [True, False]
    assert [one for _, one in theirs._loglikelihood_tokens(requests)] == [True, False]


@pytest.mark.parametrize("options", [{}, {"add_bos_token": False}])
def test_rolling_loglikelihoods_are_those_of_the_hf_model(options, ours, theirs, folder):
    if options:
        ours = InternLM2(ours.llm, max_length=128, **options)
        theirs = HFLM(
            pretrained=str(folder),
            dtype="float32",
            device="cpu",
            max_length=128,
            batch_size=1,
            **options,
        )
    texts = ["", "a", LONG[:127], LONG[:128], LONG[:129], LONG, LONG * 2]
    requests = instances("loglikelihood_rolling", *((text,) for text in texts))
    found = ours.loglikelihood_rolling(requests)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests), abs=2e-3)
    assert found[-1] < 1.8 * found[-2] < 0


def test_answers_are_those_of_the_hf_model(ours, theirs):
    asked = [
        ("Once upon a time", {"max_gen_toks": 20}),
        ("Once upon a time", {"max_gen_toks": 20, "do_sample": False, "temperature": 0.0, "until": []}),
        ("To be or not", {"max_gen_toks": 12, "repetition_penalty": 1.3}),
        (LONG, {"max_gen_toks": 16}),
    ]
    found = ours.generate_until(instances("generate_until", *asked))
    assert found == theirs.generate_until(instances("generate_until", *asked))
    assert found[0] == found[1] != ""


def test_answers_end_before_the_first_stop_text(ours, theirs):
    whole = ours.generate_until(instances("generate_until", ("Once", {"max_gen_toks": 24})))[0]
    for until in (whole[5:7], [whole[9:10], whole[4:6]], ["not in there"]):
        asked = instances("generate_until", ("Once", {"max_gen_toks": 24, "until": until}))
        found = ours.generate_until(asked)
        assert found == theirs.generate_until(asked)
        assert whole.startswith(found[0])
    assert found[0] == whole
    with_empty = {
        "max_gen_toks": 24,
        "until": [""],
    }  # NOTE: `hf` ends at once, although it means to ignore it
    assert ours.generate_until(instances("generate_until", ("Once", with_empty))) == [whole]


def test_conversations_are_written_and_read_as_by_the_hf_model(ours, theirs):
    text = ours.apply_chat_template(CONVERSATION)
    assert text == theirs.apply_chat_template(CONVERSATION)
    assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.tok_encode(text).count(ours.llm.tokenizer.bos_id) == 1
    begun = [*CONVERSATION, {"role": "assistant", "content": "The answer is"}]
    open_text = ours.apply_chat_template(begun, add_generation_prompt=False)
    assert open_text == theirs.apply_chat_template(begun, add_generation_prompt=False)
    assert open_text.endswith("assistant\nThe answer is")
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.chat_template(False) is None


def test_results_are_in_the_order_of_the_requests_beyond_one_window(ours, monkeypatch):
    monkeypatch.setattr(bridge, "WINDOW", 3)
    pairs = [("count: " + "x" * (n * 7 % 11), str(n)) for n in range(20)]
    together = ours.loglikelihood(instances("loglikelihood", *pairs))
    for pair, found in zip(pairs, together, strict=True):
        alone = ours.loglikelihood(instances("loglikelihood", pair))[0]
        assert found == pytest.approx(alone, abs=1e-4)


def test_a_request_that_fails_leaves_nothing_in_the_engine(ours):
    pairs = [("a", "b")] * 5 + [("a", "c" * 129)]
    with pytest.raises(RequestError, match=r"A continuation has 129 tokens.*only 129 fit.*larger max_length"):
        ours.loglikelihood(instances("loglikelihood", *pairs))
    assert ours.loglikelihood(instances("loglikelihood", ("a", "b")))[0][0] < 0
    ours.llm.frontend.settle()
    assert not ours.llm.frontend.engine.has_work


def test_cut_texts_are_counted(ours, caplog):
    logging.getLogger("internlm2").propagate = True
    ours.loglikelihood(instances("loglikelihood", (LONG, "a"), ("b", "c")))
    assert "1 of 2 texts are longer than max_length=128: their beginning is cut off." in caplog.text
    ours.generate_until(instances("generate_until", (LONG, {"max_gen_toks": 4})))
    assert "1 of 1 prompts leave no room for their answer in max_length=128" in caplog.text


# -- the whole harness -----------------------------------------------------------------------------------------

CHOICE = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/letters.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: ["A", "B"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
WRITE = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/letters.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["Q"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLL = """
task: pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/letters.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with three tasks over six rows."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"Is {n} odd or even? A odd B even", "answer": n % 2} for n in range(6)]
    (folder / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("letters", CHOICE), ("words", WRITE), ("pages", ROLL)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


def evaluated(model, tasks: Path, **options):
    return lm_eval.simple_evaluate(
        model=model, tasks=["letters", "words", "pages"], task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0, **options,
    )  # fmt: skip


def test_the_harness_scores_us_as_it_scores_the_hf_model(ours, theirs, tasks):
    found, expected = evaluated(ours, tasks), evaluated(theirs, tasks)
    assert found["results"].keys() == {"letters", "words", "pages"}
    for task, values in expected["results"].items():
        for name, value in values.items():
            own = found["results"][task][name]
            assert own == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), (
                task,
                name,
            )
    for task in found["samples"]:
        prompts = [[one["arguments"] for one in run["samples"][task]] for run in (found, expected)]
        assert prompts[0] == prompts[1]


def test_a_chat_template_is_applied_by_the_harness(ours, theirs, tasks):
    options = {"apply_chat_template": True, "system_instruction": "Be brief.", "num_fewshot": 0, "limit": 2}
    found, expected = (evaluated(model, tasks, **options)["samples"]["words"] for model in (ours, theirs))
    assert found[0]["arguments"] == expected[0]["arguments"]
    assert found[0]["arguments"][0][0].startswith(
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
    )
    assert [one["resps"] for one in found] == [one["resps"] for one in expected]


def test_the_registry_makes_the_model_from_the_arguments_of_the_command_line(folder, tasks):
    assert get_model("internlm2") is InternLM2
    found = evaluated(
        "internlm2", tasks, limit=1, batch_size="auto", device="cuda:0",
        model_args=f"pretrained={folder},dtype=float32,max_length=64,memory_gib=1",
    )  # fmt: skip
    assert found["config"]["model_dtype"] == "torch.float32"
    assert found["config"]["model_num_parameters"] > 1000
    assert len(found["config"]["model_sha"]) == 64
    assert found["config"]["model"] == "internlm2"


@pytest.fixture
def quiet(monkeypatch) -> Iterator[None]:
    """The harness sets up its own log when its command is run, and reads 14,000 files of tasks, which takes long."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    logger = logging.getLogger("lm_eval")
    before = (logger.handlers[:], logger.propagate, logger.level)
    yield
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.mark.usefixtures("quiet")
def test_the_command_line_evaluates_writes_results_and_answers_from_its_cache(
    folder, tasks, tmp_path, capsys, monkeypatch
):
    arguments = [
        "eval", "lm-eval", "--model", "internlm2", "--model_args", f"pretrained={folder},dtype=float32",
        "--tasks", "letters,words", "--include_path", str(tasks), "--output_path", str(tmp_path / "out"),
        "--use_cache", str(tmp_path / "answers"), "--device", "cpu", "--batch_size", "auto", "--log_samples",
    ]  # fmt: skip
    before = list(sys.argv)
    assert command(arguments) == 0
    assert sys.argv == before
    assert "|letters|" in capsys.readouterr().out.replace(" ", "")
    first = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert first["config"]["model"] == "internlm2"
    assert first["results"]["letters"]["sample_len"] == 6

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the engine was asked again")

    monkeypatch.setattr(InternLM2, "_begin_score", never)
    monkeypatch.setattr(bridge.LLM, "begin_generate", never)
    arguments[arguments.index("--output_path") + 1] = str(tmp_path / "again")
    assert command(arguments) == 0
    again = json.loads(next((tmp_path / "again").rglob("results_*.json")).read_text())
    assert again["results"] == first["results"]


@pytest.mark.usefixtures("quiet")
def test_help_and_mistakes_are_those_of_lm_eval(capsys):
    assert command(["eval", "lm-eval", "--help"]) == 0
    assert "usage: lm-eval" in capsys.readouterr().out
    assert command(["eval", "lm-eval", "run", "--no-such-flag"]) == 2
    assert "--no-such-flag" in capsys.readouterr().err


@pytest.mark.usefixtures("quiet")
def test_what_the_user_can_mend_is_said_in_one_sentence(folder, tasks, capsys):
    arguments = [
        "eval",
        "lm-eval",
        "--model",
        "internlm2",
        "--tasks",
        "letters",
        "--include_path",
        str(tasks),
    ]
    assert command([*arguments, "--model_args", f"pretrained={folder},dtyp=float32"]) == 2
    assert "Error: " in (said := capsys.readouterr().err)
    assert "dtyp" in said
    assert "Did you mean 'dtype'?" in said


def test_what_cannot_be_done_is_refused(ours, folder):
    with pytest.raises(ConfigError, match="add_bos_tokn"):
        InternLM2(str(folder), add_bos_tokn=True)
    with pytest.raises(RequestError, match="no code of a model folder is ever run"):
        InternLM2(str(folder), trust_remote_code=True)
    with pytest.raises(RequestError, match="there is one template only"):
        ours.chat_template("tool_use")
    for given, told in (
        ({"num_beams": 4}, "gives num_beams=4, but this model takes 1 only"),
        ({"length_penalty": 2.0}, "gives length_penalty=2.0 for its answers, which this model does not know"),
        ({"max_gen_toks": 128}, "wants 128 tokens of answer, but prompt and answer together may have 128"),
        ({"temperature": -1.0, "do_sample": True}, "temperature is -1.0"),
    ):
        with pytest.raises(RequestError, match=told):
            ours.generate_until(instances("generate_until", ("a", given)))


def test_a_vocabulary_without_an_end_needs_a_prefix(ours, monkeypatch):
    specials = ours.llm.tokenizer.specials
    monkeypatch.setattr(ours.llm.tokenizer, "specials", type(specials)(
        specials.ids, specials.names, None, None, None, specials.stop_ids
    ))  # fmt: skip
    with pytest.raises(RequestError, match=r"no end token.*Give prefix_token_id=ID"):
        ours.loglikelihood(instances("loglikelihood", ("", "a")))


def test_sampling_follows_its_seed(ours):
    def answer(seed: int) -> str:
        given = {"do_sample": True, "temperature": 1.0, "top_k": 50, "max_gen_toks": 8, "seed": seed}
        return ours.generate_until(instances("generate_until", ("Once", given)))[0]

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_without_the_package_the_pip_command_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "internlm2.eval.bridge")
    with pytest.raises(MissingDependencyError, match=r"pip install 'internlm2\[lm-eval\]'"):
        importlib.import_module("internlm2.eval.bridge")
