"""All checks in order: the installation first, then the folder."""

from pathlib import Path

from internlm2.doctor.finding import Finding
from internlm2.doctor.folder import examine_folder, is_model_folder
from internlm2.doctor.probes import examine_transformers
from internlm2.doctor.stack import examine_stack


def examine(path: Path | None = None, *, plain: bool = True) -> list[Finding]:
    """Findings about this installation and, with `path`, about a model folder.

    plain: also ask transformers as it is installed, without internlm2.hf.
    """
    findings = examine_stack()
    if path is None:
        return findings
    findings += examine_folder(path)
    if is_model_folder(path) and not any(f.check == "weights" and f.level == "wrong" for f in findings):
        findings += examine_transformers(path, plain=plain)
    return findings
