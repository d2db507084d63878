"""What the kernels' formats lose on a real model and real text (docs/quantization.md has the figures and their reading)."""

import pytest

from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.quantization_loss import EVALUATION_TEXT, measure_loss, read_text
from internlm2.checkpoint.quantize import QuantizeOptions, quantize_checkpoint

NUM_TOKENS = 2048


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "agreement", "rise"), [("int8", 0.97, 0.005), ("int4", 0.90, 0.06)])
def test_the_demo_model_on_packed_weights_keeps_its_quality(demo, kind, agreement, rise):
    checkpoint = open_checkpoint(demo)
    text = read_text(checkpoint, EVALUATION_TEXT, max_tokens=NUM_TOKENS)
    loss = measure_loss(checkpoint, checkpoint, text, quantization=kind)
    print(loss.as_text())
    assert loss.num_tokens >= 2000
    assert loss.top1_agreement > agreement
    assert loss.perplexity_rise < rise


@pytest.mark.slow
def test_int8_files_of_the_demo_model_keep_its_quality(demo, tmp_path):
    checkpoint = open_checkpoint(demo)
    text = read_text(checkpoint, EVALUATION_TEXT, max_tokens=NUM_TOKENS)
    quantize_checkpoint(checkpoint, tmp_path / "int8", QuantizeOptions(kind="int8", method="rtn"))
    loss = measure_loss(checkpoint, open_checkpoint(tmp_path / "int8"), text)
    assert loss.top1_agreement > 0.97
    assert loss.perplexity_rise < 0.005
