"""Ask transformers itself, in a process of its own: which ids does AutoTokenizer give, what does AutoModel load?

Once as it is installed and once after `import internlm2.hf`. The folder's Python files are run in neither.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from internlm2.checkpoint.formats.official import ModelCheckpoint
from internlm2.checkpoint.load import load_model
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.save import save_checkpoint
from internlm2.doctor.finding import Finding
from internlm2.doctor.stack import installed
from internlm2.errors import InternLM2Error
from internlm2.model.config import ModelConfig
from internlm2.model.heads import build_model
from internlm2.tokenizer import Tokenizer

PROBES = (
    "A beautiful flower",
    "来到美丽的大自然",
    "  two spaces  and\ttabs\n\n",
    " leading space",
    "def f(x):\n    return x ** 2  # comment\n",
    "emoji 😀👩‍👩‍👧 and ﬁ ligature",
    "1234567890 3.14159",
    "a != b . c , d ?",
    "Ünïcödé ñ Здравствуй こんにちは",
    "mixed 中文 and English，标点。",
    "\u00a0\u3000\u200b",
    "https://example.org/?q=1&r=2",
    "[UNUSED] <tag> </tag>",
)
CHILD = Path(__file__).with_name("probe_child.py")
TIMEOUT_SECONDS = 300
OURS = "import internlm2.hf before AutoTokenizer and AutoModel, or use internlm2.Tokenizer."


def examine_transformers(folder: Path, *, plain: bool = True) -> list[Finding]:
    """Findings about AutoTokenizer and AutoModel on this folder; none when transformers is absent.

    plain: also ask transformers as it is, without internlm2.hf.
    """
    if installed("transformers") is None:
        return []
    findings: list[Finding] = []
    try:
        tokenizer = Tokenizer.from_pretrained(folder)
    except InternLM2Error:
        return []  # examine_folder has reported it
    for with_hf in (False, True) if plain else (True,):
        name = "AutoTokenizer after import internlm2.hf" if with_hf else "AutoTokenizer as installed"
        findings.append(_tokenizer_finding(name, folder, tokenizer, with_hf=with_hf))
    findings.append(_rotary_finding(folder))
    return findings


def _ask(task: str, folder: Path, *, with_hf: bool) -> dict[str, Any]:
    request = {"task": task, "folder": str(folder), "with_hf": with_hf, "probes": PROBES}
    try:
        done = subprocess.run(
            [sys.executable, str(CHILD)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {TIMEOUT_SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = done.stderr.strip().splitlines()
        return {"error": reason[-1] if reason else f"exit code {done.returncode}"}
    return json.loads(lines[-1])


def _tokenizer_finding(name: str, folder: Path, tokenizer: Tokenizer, *, with_hf: bool) -> Finding:
    answer = _ask("tokenizer", folder, with_hf=with_hf)
    remedy = "Please report this: it is a bug in internlm2." if with_hf else OURS
    if "error" in answer:
        return Finding(name, "wrong", f"does not load: {answer['error']}", remedy)
    wrong = [
        text
        for text, ids in zip(PROBES, answer["ids"], strict=True)
        if ids != tokenizer.encode(text, bos=True)
    ]
    lossy = [
        t for t, decoded in zip(PROBES, answer["decoded"], strict=True) if decoded != t and t not in wrong
    ]
    markers = {k: v for k, v in tokenizer.special_tokens.items() if k.startswith("<|im_")}
    wrong_markers = {k: v for k, v in answer["markers"].items() if k in markers and v != markers[k]}
    if not (wrong or lossy or wrong_markers):
        return Finding(name, "ok", f"right ids for all {len(PROBES)} probe texts")
    parts = []
    if wrong:
        ids = answer["ids"][PROBES.index(wrong[0])]
        expected = tokenizer.encode(wrong[0], bos=True)
        parts.append(
            f"other ids for {len(wrong)} of {len(PROBES)} texts: {wrong[0]!r} gives {ids[:8]}, right is {expected[:8]}"
        )
    if lossy:
        parts.append(f"{len(lossy)} more do not decode to themselves: {lossy[0]!r}")
    if wrong_markers:
        parts.append(f"chat markers {wrong_markers}, right is {markers}")
    return Finding(name, "wrong", "; ".join(parts) + ".", remedy)


def _rotary_finding(folder: Path) -> Finding:
    """Load a small model with the folder's rotary settings through AutoModel and compare logits with ours."""
    name = "rotary after load"
    config = open_checkpoint(folder).config
    small = ModelConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling,
    )
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "small"
        model = build_model(small)
        model.init_weights(torch.Generator().manual_seed(0))
        save_checkpoint(ModelCheckpoint(model), path)
        with torch.no_grad():
            expected = load_model(path)(torch.arange(3, 35)[None])
        answer = _ask("model", path, with_hf=True)
    if "error" in answer:
        return Finding(name, "wrong", f"AutoModel does not load: {answer['error']}", "Please report this.")
    difference = (torch.tensor(answer["logits"]) - expected[0]).abs().max().item()
    if difference < 1e-4:
        text = f"AutoModel after import internlm2.hf: logits equal to {difference:.0e}; {answer['buffers']} buffers"
        return Finding(name, "ok", text)
    return Finding(name, "wrong", f"logits differ by {difference:.2g}", "Please report this: it is a bug.")
