"""The demo model through the bridge, against transformers' Llama."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the harness asks the hub for the commit of a model folder

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from internlm2.checkpoint.export import export_checkpoint
from internlm2.checkpoint.open import open_checkpoint
from internlm2.eval.bridge import InternLM2
from internlm2.eval.profile import find_profile
from internlm2.eval.questions import RunSettings, choose_questions


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, own, 0, ("task", n, 1)) for n, own in enumerate(arguments)]


@pytest.mark.slow
def test_the_demo_model_is_scored_as_by_transformers_llama(demo, tmp_path, sample):
    """The harness's `hf` on the same weights in Llama's layout: none of our code computes there."""
    export_checkpoint(open_checkpoint(demo), tmp_path / "llama", to="llama")
    theirs = HFLM(pretrained=str(tmp_path / "llama"), dtype="float32", device="cpu", batch_size=1)
    ours = InternLM2("demo", dtype="float32", device="cpu")
    settings = RunSettings(("mmlu.abstract_algebra", "gsm8k"))
    mmlu, gsm8k = choose_questions(sample, find_profile(settings.profile), settings)
    pairs = [(item.prompt.text.rstrip(), f" {letter}") for item in mmlu.items for letter in "ABCD"]
    pairs += [("", "Once upon a time"), ("The capital of France is", " Paris")]
    found, expected = (model.loglikelihood(instances("loglikelihood", *pairs)) for model in (ours, theirs))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [one for _, one in found] == [one for _, one in expected]
    chats = [[{"role": "user", "content": text}] for text in ("Name three colours.", "What is 2 + 2?")]
    asked = [(ours.apply_chat_template(chat), {"max_gen_toks": 40}) for chat in chats]
    asked.append((next(gsm8k.items).prompt.text, {"max_gen_toks": 24, "until": ["Question:"]}))
    assert [theirs.apply_chat_template(chat) for chat in chats] == [text for text, _ in asked[:2]]
    written = [model.generate_until(instances("generate_until", *asked)) for model in (ours, theirs)]
    assert written[0] == written[1]
    assert all(written[0])
    text = sample.text("gsm8k/test.jsonl")[:1500]
    rolled = [m.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))[0] for m in (ours, theirs)]
    assert rolled[0] == pytest.approx(rolled[1], abs=2e-5 * len(ours.tok_encode(text)))
