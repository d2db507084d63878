"""The model card's snippets, word for word, in a fresh process, on a folder whose Python files bite."""

import os
import subprocess
import sys

import pytest
import torch

from official_folder import CODE_FILES, write_official_folder

# From the card of InternLM2-7B, English and Chinese; the indent of the loop, lost on the page, is restored.
CARD = """
import torch
from transformers import AutoTokenizer, AutoModelForCausalLM

tokenizer = AutoTokenizer.from_pretrained("internlm/internlm2-7b", trust_remote_code=True)
# {comment}
model = AutoModelForCausalLM.from_pretrained("internlm/internlm2-7b", torch_dtype=torch.float16, trust_remote_code=True).cuda()
model = model.eval()
inputs = tokenizer(["{prompt}"], return_tensors="pt")
for k,v in inputs.items():
    inputs[k] = v.cuda()
gen_kwargs = {{"max_length": 128, "top_p": 0.8, "temperature": 0.8, "do_sample": True, "repetition_penalty": 1.0}}
output = model.generate(**inputs, **gen_kwargs)
output = tokenizer.decode(output[0].tolist(), skip_special_tokens=True)
print(output)
"""
PROMPTS = {
    "english": (
        "Set `torch_dtype=torch.float16` to load model in float16, otherwise it will be loaded as float32 and might "
        "cause OOM Error.",
        "A beautiful flower",
    ),
    "chinese": (
        "`torch_dtype=torch.float16` 可以令模型以 float16 精度加载,否则 transformers 会将模型加载为 float32,"
        "有可能导致显存不足",
        "来到美丽的大自然",
    ),
}
PROBE = """
assert inputs["input_ids"][0].tolist() == tokenizer.internlm2.encode({prompt!r}, bos=True)
assert model.dtype == torch.float16 and type(model).__module__ == "internlm2.hf.modeling"
assert not [name for name in __import__("sys").modules if "transformers_modules" in name]
chat = AutoModelForCausalLM.from_pretrained("internlm/internlm2-7b", trust_remote_code=True)
print("\\n", chat.chat(tokenizer, "hi", max_new_tokens=4)[1])
"""


def run(folder, script: str) -> subprocess.CompletedProcess[str]:
    if not torch.cuda.is_available():
        script = script.replace(".cuda()", "")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("early", [False, True], ids=["renamed", "early"])
def test_the_cards_snippets_work_and_run_no_file_of_the_folder(tmp_path, official_folder, early):
    home = official_folder
    if early:
        home = write_official_folder(tmp_path / "internlm" / "internlm2-7b", early=True)
    script = "import internlm2.hf\n"
    for language, trusts in (("chinese", early), ("english", not early)):
        comment, prompt = PROMPTS[language]
        snippet = CARD.format(comment=comment, prompt=prompt)
        if not trusts:
            snippet = snippet.replace(", trust_remote_code=True", "")
        script += snippet + PROBE.format(prompt=prompt)
    result = run(home.parent.parent, script)
    assert result.returncode == 0, result.stderr
    for _, prompt in PROMPTS.values():
        assert f"\n{prompt}" in f"\n{result.stdout}"
    assert not (home / "EXECUTED").exists()


@pytest.mark.parametrize("name", [n for n in CODE_FILES if "/" not in n])
def test_the_files_of_the_folder_do_bite(official_folder, name):
    script = (
        f"import importlib.util as u; s = u.spec_from_file_location('m', {str(official_folder / name)!r})\n"
    )
    result = run(official_folder, script + "m = u.module_from_spec(s); s.loader.exec_module(m)")
    assert f"{name} was executed" in result.stderr
    (official_folder / "EXECUTED").unlink()


def test_without_our_import_transformers_does_run_them(tmp_path):
    home = write_official_folder(tmp_path / "internlm" / "internlm2-7b")
    result = run(tmp_path, CARD.format(comment="", prompt="A"))
    assert result.returncode != 0
    assert "was executed" in result.stderr
    assert (home / "EXECUTED").exists()


def test_without_transformers_the_import_says_how_to_get_it(tmp_path):
    result = run(tmp_path, "import sys; sys.modules['transformers'] = None; import internlm2.hf")
    assert "MissingDependencyError" in result.stderr
    assert "pip install 'internlm2[hf]'" in result.stderr
