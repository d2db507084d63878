"""The work that `eval cost` predicts, counted by torch's FLOP counter in our engine and in transformers' Llama."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from internlm2.cli import main as cli
from internlm2.engine.llm import LLM
from internlm2.eval.backends.engine import EngineModel
from internlm2.eval.cost import Cost, Load, MeanAnswer, as_text, count, estimate, mean_answers
from internlm2.eval.devices import DEVICES, measured_device
from internlm2.eval.profile import find_profile
from internlm2.eval.questions import RunSettings, choose_questions
from internlm2.eval.run_folder import read_samples
from internlm2.eval.runner import evaluate
from internlm2.eval.task import EvalError
from internlm2.model.config import ModelConfig, preset
from internlm2.tokenizer import Tokenizer

H100 = DEVICES["h100"]
DEMO = ModelConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip


def predicted(config, tokenizer, sample, *, task: str, answer: MeanAnswer | None = None) -> Cost:
    """Of the first question of a task, in bfloat16."""
    settings = RunSettings((task,), limit=1)
    parts = choose_questions(sample, find_profile(settings.profile), settings)
    answers = None if answer is None else {parts[0].facts.name: answer}
    loads = count(tokenizer, parts, settings, max_model_len=config.max_position_embeddings, answers=answers)
    (cost,) = estimate(loads, config, H100)
    assert cost.load.num_questions == 1
    return cost


def llama(config):
    """transformers' Llama of the same shape, without values: its operations are counted, not computed."""
    transformers = pytest.importorskip("transformers")
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, head_dim=config.head_dim,
        intermediate_size=config.intermediate_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
        tie_word_embeddings=config.tie_word_embeddings, attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(shape).bfloat16()
    model.tie_weights()
    return model


def ids(num_tokens: int) -> torch.Tensor:
    return torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")


@pytest.mark.parametrize("config", [preset("7b"), DEMO], ids=["7b", "tied"])
def test_products_of_an_mmlu_question_are_those_of_llama(config, chat_folder, sample):
    cost = predicted(config, Tokenizer.from_pretrained(chat_folder), sample, task="mmlu.abstract_algebra")
    length = cost.load.computed_tokens
    assert cost.load.prompt_tokens == 4 * (length + 1), "all four labels are read off one pass"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        llama(config)(ids(length), logits_to_keep=1)
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    attention = counted.pop("aten.bmm")
    # Llama multiplies every query with every key; a causal one needs the keys up to its own.
    assert cost.prefill_flops == sum(counted.values()) + attention * (length + 1) // (2 * length)
    assert attention > 0 < sum(counted.values())


@pytest.mark.parametrize("config", [preset("7b"), DEMO], ids=["7b", "tied"])
def test_bytes_and_products_of_an_answer_are_those_of_llama(config, chat_folder, sample):
    num_steps, model = 3, llama(config)
    answer = MeanAnswer(num_steps + 1, num_steps)
    cost = predicted(config, Tokenizer.from_pretrained(chat_folder), sample, task="gsm8k", answer=answer)
    with torch.no_grad():
        cache = model(ids(cost.load.prompt_tokens), logits_to_keep=1).past_key_values
        read = 0
        with FlopCounterMode(display=False) as counter:
            for _ in range(num_steps):
                model(ids(1), past_key_values=cache)
                read += sum(one.nbytes for layer in cache.layers for one in (layer.keys, layer.values))
    weights = {id(one): one for one in model.parameters()}  # a tied head is one with the table
    if not config.tie_word_embeddings:
        del weights[id(model.get_input_embeddings().weight)]
    assert cost.decode_bytes == read + num_steps * sum(one.nbytes for one in weights.values())
    assert cost.decode_flops == counter.get_total_flops()


@pytest.mark.parametrize("task", ["mmlu.abstract_algebra", "bbh.boolean_expressions"])
def test_products_are_those_that_our_engine_computes_with_all_that_it_shares(
    task, chat_folder, sample, tmp_path
):
    torch.set_num_threads(1)
    llm = LLM(chat_folder, dtype="float32", max_model_len=2560, quantization="none")
    counted: Counter[str] = Counter()
    engine = llm.frontend.engine
    step = engine.step

    def counting_step():  # in the engine's thread, where a counter around the whole run would see nothing
        with FlopCounterMode(display=False) as counter:
            updates = step()
        flops = counter.get_flop_counts().get("Global", {})
        counted.update({str(name): one for name, one in flops.items()})
        return updates

    engine.step = counting_step
    settings = RunSettings((task,))
    parts = choose_questions(sample, find_profile(settings.profile), settings)
    for part in parts:  # answers of 3 tokens
        part.subsets.update(
            {k: [replace(i, max_tokens=min(3, i.max_tokens)) for i in v] for k, v in part.subsets.items()}
        )
    evaluate(EngineModel(llm, name="tiny"), parts, tmp_path / "run", settings)
    config = llm.model.config
    answers = mean_answers(read_samples(tmp_path / "run").values())
    loads = count(llm.tokenizer, parts, settings, max_model_len=2560, answers=answers, config=config)
    (cost,) = estimate(loads, config, H100, dtype="float32")
    keys = cost.load.attended + cost.load.decoded_keys
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys
    assert counted["aten.mm"] == cost.prefill_flops + cost.decode_flops - attention
    assert (llm.stats.num_output_tokens > 0) == (task.startswith("bbh"))


def bench_report(tmp_path, figures, settings=None):
    """As `internlm2 bench --json` writes it. figures: (part, what, unit, median)."""
    rows = [dict(zip(("part", "what", "unit", "median"), figure, strict=True)) for figure in figures]
    given = {"model": "demo", "runs on": "cpu", "prompt tokens": 100, "output tokens": 20}
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"settings": given | (settings or {}), "figures": rows}))
    return file


PREFILL = ("prefill", "prompt of 512 tokens", "tokens/s", 2048.0)
STEP = ("latency", "time per token after it", "ms", 10.0)


def test_a_measured_speed_predicts_what_was_measured(tmp_path):
    """The prompt and the answer of the measurement itself take as long as they took."""
    file = bench_report(tmp_path, [("prefill", "prompt of 128 tokens", "tokens/s", 1.0), PREFILL, STEP])
    device = measured_device(file, DEMO)
    load = Load(
        "x", computed_tokens=512, attended=512 * 513 // 2, num_answers=1, output_tokens=20,
        decoded_tokens=19, decoded_keys=19 * 110,
    )  # fmt: skip
    (cost,) = estimate([load], DEMO, device)
    assert cost.prefill_seconds == pytest.approx(512 / 2048)
    assert cost.decode_seconds == pytest.approx(19 * 0.010)
    text = as_text([cost], device, are_answers_measured=False)
    assert "demo on cpu:" in text
    assert "were measured" in text
    assert "all together about" in text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"settings": {}}', "KeyError: 'figures'"),
        ('{"settings": 3, "figures": []}', "its settings are no object"),
        ('{"settings": {}, "figures": []}', "it has not both prefill and latency"),
        ('{"settings": {}, "figures": [{"part": 1, "what": "", "unit": "", "median": 1}]}', "a figure is"),
    ],
)
def test_what_is_no_report_of_a_speed_is_refused(text, why, tmp_path):
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(EvalError, match=f"no report of a model's speed: {why}.*internlm2 bench MODEL"):
        measured_device(file, DEMO)


def test_rates_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(EvalError, match="cannot be read: No such file"):
        measured_device(tmp_path / "none.json", DEMO)
    for median in (0, -1.0, True, "fast", float("inf"), float("nan")):
        with pytest.raises(EvalError, match="a figure is"):
            measured_device(bench_report(tmp_path, [(*PREFILL[:3], median), STEP]), DEMO)
    with pytest.raises(EvalError, match="prompt tokens is None"):
        measured_device(bench_report(tmp_path, [PREFILL, STEP], {"prompt tokens": None}), DEMO)


def test_the_command_takes_the_report_of_bench_itself(chat_folder, sample, tmp_path, capsys):
    words = [
        "bench",
        str(chat_folder),
        "--only",
        "latency,prefill",
        "--repeats",
        "1",
        "--json",
        "--threads",
        "1",
    ]
    assert cli.run([*words, "--prompt-tokens", "8", "--output-tokens", "4", "--prefill-tokens", "32"]) == 0
    file = tmp_path / "bench.json"
    file.write_text(capsys.readouterr().out)
    words = ["eval", "cost", str(chat_folder), "--tasks", "gsm8k", "--data", str(sample.path)]
    words += ["--max-model-len", "16384", "--bench", str(file)]
    assert cli.run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["device"]["is_measured"] is True
    assert told["tasks"][0]["seconds"] > 0
    assert cli.run([*words, "--reached", "0.5"]) == 2
    assert "Leave --device, --tflops, --gbps and --reached out" in capsys.readouterr().err
