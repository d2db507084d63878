"""`model quantize` as one call: resolve and open a model, read the texts, write the folder, measure what was lost."""

import json
from pathlib import Path

from internlm2 import files
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.quantization_loss import (
    CALIBRATION_TEXT,
    EVALUATION_TEXT,
    measure_loss,
    read_text,
)
from internlm2.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from internlm2.checkpoint.resolve import resolve_model
from internlm2.errors import check
from internlm2.quant.report import LossReport

LOSS_FILE = "loss.json"


def quantize_model_folder(
    model: str | Path,
    target: Path,
    options: QuantizeOptions,
    *,
    calibration: Path | None = None,
    calibration_tokens: int = 16_384,
    report: bool = False,
    text: Path | None = None,
    report_tokens: int = 8_192,
) -> LossReport | None:
    """Quantise the model at `model` into a new folder `target`; with `report`, say what was lost.

    calibration, text: UTF-8 files for every method but "rtn" and for the report; None: small ones that come with the
    package. The report is kept in the folder as loss.json. Raises CheckpointError, ExportError, RequestError.
    """
    check(calibration_tokens >= 2, "calibration_tokens", calibration_tokens, "at least 2")
    check(report_tokens >= 2, "report_tokens", report_tokens, "at least 2")
    files.check_new(target)  # before hours of work
    checkpoint = open_checkpoint(resolve_model(model))
    text_ids = None
    if report:
        text_ids = read_text(checkpoint, text or EVALUATION_TEXT, max_tokens=report_tokens)
    calibration_ids = None
    if options.needs_text:
        calibration_ids = read_text(
            checkpoint, calibration or CALIBRATION_TEXT, max_tokens=calibration_tokens
        )
    quantize_checkpoint(checkpoint, target, options, text=calibration_ids)
    if text_ids is None:
        return None
    loss = measure_loss(checkpoint, open_checkpoint(target), text_ids)
    files.write_text(target / LOSS_FILE, json.dumps(loss.as_json(), indent=2) + "\n")
    return loss
