"""What a run will cost: tokens as the engine counts them, times by hand."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from internlm2.checkpoint.source import expected_shapes
from internlm2.engine.llm import LLM
from internlm2.eval.backends.engine import EngineModel
from internlm2.eval.cost import Load, as_text, count, estimate, mean_answers
from internlm2.eval.devices import DEVICES, find_device
from internlm2.eval.profile import find_profile
from internlm2.eval.questions import RunSettings, choose_questions
from internlm2.eval.run_folder import read_samples
from internlm2.eval.runner import evaluate
from internlm2.eval.task import EvalError
from internlm2.model.config import preset
from internlm2.tokenizer import Tokenizer

H100 = DEVICES["h100"]


@pytest.mark.parametrize("window", [256, 8192])
def test_tokens_are_those_that_the_engine_computes(window, chat_folder, sample, tmp_path):
    """In both windows: beyond the one of the model, only texts of the same length share what they begin with."""
    shutil.copytree(chat_folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": window}))
    torch.set_num_threads(1)
    llm = LLM(tmp_path / "model", dtype="float32", max_model_len=2560)
    settings = RunSettings(("mmlu.abstract_algebra", "bbh.boolean_expressions"))
    parts = choose_questions(sample, find_profile(settings.profile), settings)
    for part in parts:  # answers of 3 tokens
        part.subsets.update(
            {k: [replace(i, max_tokens=min(3, i.max_tokens)) for i in v] for k, v in part.subsets.items()}
        )
    results = evaluate(EngineModel(llm, name="tiny"), parts, tmp_path / "run", settings)
    lengths = mean_answers(read_samples(tmp_path / "run").values())
    loads = count(
        llm.tokenizer, parts, settings,
        max_model_len=llm.max_model_len, answers=lengths, config=llm.model.config,
    )  # fmt: skip
    assert sum(load.computed_tokens for load in loads) == llm.stats.num_prompt_tokens
    assert llm.stats.num_cached_tokens > 0, "otherwise nothing is shared, and this shows nothing"
    all_alike = count(llm.tokenizer, parts, settings, max_model_len=llm.max_model_len)
    num_alike = sum(load.computed_tokens for load in all_alike)
    assert (num_alike < llm.stats.num_prompt_tokens) == (window == 256)
    for load in loads:
        task = results.tasks[load.task]
        assert (load.num_questions, load.num_errors) == (task.num_questions, 0)
        assert load.prompt_tokens == task.prompt_tokens
        assert load.output_tokens == pytest.approx(task.output_tokens)


def test_answers_that_no_run_measured_are_as_long_as_their_limit(chat_folder, sample):
    settings = RunSettings(("gsm8k",))
    tokenizer = Tokenizer.from_pretrained(chat_folder)
    (load,) = count(
        tokenizer, choose_questions(sample, find_profile("fixed"), settings), settings, max_model_len=32768
    )
    assert load.output_tokens == 512 * load.num_answers
    assert load.decoded_tokens == 511 * load.num_answers, "the last token of a cut answer is never read"
    (cut,) = count(
        tokenizer, choose_questions(sample, find_profile("fixed"), settings), settings, max_model_len=100
    )
    assert cut.num_errors == cut.num_questions == load.num_questions


def test_times_are_work_over_rate():
    config = preset("7b")
    matrices = (shape for shape in expected_shapes(config).values() if len(shape) == 2)
    num_layers = sum(torch.Size(shape).numel() for shape in matrices)
    num_layers -= (
        2 * config.vocab_size * config.hidden_size
    )  # embedding and head: 7.7 billion parameters in all
    (cost,) = estimate([Load("x", computed_tokens=10**6)], config, H100)
    assert cost.prefill_seconds == pytest.approx(2 * num_layers * 1e6 / 989.4e12)
    assert cost.decode_seconds == 0
    (cost,) = estimate([Load("x", attended=10**9)], config, H100)
    assert cost.prefill_flops == 4 * 32 * 4096 * 10**9
    (cost,) = estimate([Load("x", num_scored=1000)], config, H100)
    assert cost.prefill_flops == 2 * config.vocab_size * config.hidden_size * 1000


def test_answers_are_written_together_and_read_the_weights_once_for_all():
    config = preset("7b")
    read = 2 * (num_parameters(config) - config.vocab_size * config.hidden_size)  # not the embedding table
    keys = 2 * 32 * 8 * 128 * 2  # bytes of a token: keys and values, layers, heads, width, bfloat16
    load = Load(
        "x", num_answers=640, output_tokens=640 * 100, decoded_tokens=640 * 100, decoded_keys=640 * 100 * 1000
    )
    (cost,) = estimate([load], config, H100, max_num_seqs=64)
    assert cost.num_at_once == 64
    assert cost.decode_bytes == pytest.approx(1000 * read + keys * 640 * 100 * 1000)
    assert cost.decode_seconds == pytest.approx(cost.decode_bytes / 3.35e12)
    long = Load(
        "x",
        num_answers=640,
        output_tokens=640 * 100,
        decoded_tokens=640 * 100,
        decoded_keys=640 * 100 * 200_000,
    )
    assert estimate([long], config, H100)[0].num_at_once == 2, "26 GB each beside 15 GB of weights"


def num_parameters(config) -> int:
    return sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())


def test_half_of_the_rates_is_twice_the_time():
    load = Load(
        "x", computed_tokens=1000, num_answers=1, output_tokens=10, decoded_tokens=9, decoded_keys=100
    )
    (whole,) = estimate([load], preset("7b"), H100)
    (half,) = estimate([load], preset("7b"), replace(H100, prefill_share=0.5, decode_share=0.5))
    assert half.seconds == pytest.approx(2 * whole.seconds)


def test_what_cannot_be_is_refused():
    with pytest.raises(EvalError, match=r"No device called 'h10'.*h100"):
        find_device("h10")
    with pytest.raises(EvalError, match="prefill_share is 0, but must be a number above 0"):
        replace(H100, prefill_share=0)
    with pytest.raises(EvalError, match=r"The weights have .* Choose a smaller shape"):
        estimate([Load("x")], preset("20b"), replace(H100, memory_bytes=10e9))


def test_the_table_says_what_it_rests_on():
    costs = estimate([Load("gsm8k", 5, 1, 1000, 400)], preset("7b"), replace(H100, prefill_share=0.5))
    text = as_text(costs, H100, are_answers_measured=False)
    assert "gsm8k" in text
    assert "as long as their limit allows" in text
    assert "1 questions do not fit" in text


def test_the_command_counts_without_a_model(chat_folder, sample, tmp_path, capsys):
    from internlm2.cli import main as cli

    words = ["eval", "cost", str(chat_folder), "--tasks", "mmlu.abstract_algebra", "--data", str(sample.path)]
    assert cli.run([*words, "--shape", "7b", "--json"]) == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    assert task["load"]["task"] == "mmlu"
    assert 0 < task["load"]["computed_tokens"] < task["load"]["prompt_tokens"]
    assert task["seconds"] > 0
    assert cli.run([*words, "--reached", "0.4"]) == 0
    assert "of which 40% are reached" in capsys.readouterr().out
