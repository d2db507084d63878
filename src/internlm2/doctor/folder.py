"""A model folder: config, weights, tokenizer, stop tokens, template, generation_config."""

import json
from pathlib import Path

from internlm2.checkpoint.config_json import CONFIG_FILE, read_json
from internlm2.checkpoint.gguf.vocab_write import folder_template
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.source import Checkpoint, check_complete
from internlm2.doctor.finding import Finding
from internlm2.errors import InternLM2Error
from internlm2.model.config import PRESETS
from internlm2.tokenizer import Tokenizer
from internlm2.tokenizer.special import OLD_SPELLINGS

PLAIN_TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "R"},
]
IM_END = "<|im_end|>"


def examine_folder(folder: Path) -> list[Finding]:
    """Everything that can be told without transformers."""
    findings: list[Finding] = []
    checkpoint = _weights(folder, findings)
    _python_files(folder, findings)
    if checkpoint is not None and checkpoint.tokenizer_folder is not None:
        tokenizer = _tokenizer(checkpoint.tokenizer_folder, checkpoint, findings)
        if tokenizer is not None:
            _two_tokenizers(checkpoint.tokenizer_folder, tokenizer, findings)
            _stops(checkpoint.tokenizer_folder, tokenizer, findings)
            _template(checkpoint.tokenizer_folder, tokenizer, findings)
    return findings


def _weights(folder: Path, findings: list[Finding]) -> Checkpoint | None:
    try:
        checkpoint = open_checkpoint(folder)
        check_complete(checkpoint)
    except InternLM2Error as error:
        findings.append(Finding("weights", "wrong", str(error), "See the message."))
        return None
    config = checkpoint.config
    kind = type(checkpoint).__name__.removesuffix("Checkpoint")
    findings.append(
        Finding(
            "weights", "ok", f"{kind} layout, {config.head} head, all {len(checkpoint.tensors)} tensors there"
        )
    )
    is_internlm2 = kind == "Official" and config.vocab_size == PRESETS["7b"].vocab_size
    if is_internlm2 and config.rope_scaling is None and config.head == "language":
        findings.append(
            Finding(
                "rope",
                "note",
                f"rope_scaling is null: right up to {config.max_position_embeddings} tokens.",
                'For longer texts put "rope_scaling": {"type": "dynamic", "factor": 2.0} into config.json, as the '
                "later releases of the chat models have.",
            )
        )
    return checkpoint


def _python_files(folder: Path, findings: list[Finding]) -> None:
    files = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
    if files:
        findings.append(
            Finding("python files", "note", f"{', '.join(files)}: this package never executes them.")
        )


def _tokenizer(folder: Path, checkpoint: Checkpoint, findings: list[Finding]) -> Tokenizer | None:
    try:
        tokenizer = Tokenizer.from_pretrained(folder)
    except InternLM2Error as error:
        findings.append(Finding("tokenizer", "wrong", str(error), "See the message."))
        return None
    rows = checkpoint.config.vocab_size
    if tokenizer.vocab_size > rows:
        findings.append(
            Finding(
                "tokenizer",
                "wrong",
                f"{tokenizer.vocab_size} tokens, but the embedding has {rows} rows.",
                "Copy the tokenizer files of this very model.",
            )
        )
    else:
        findings.append(
            Finding("tokenizer", "ok", f"{tokenizer.vocab_size} tokens, embedding of {rows} rows")
        )
    return tokenizer


def _two_tokenizers(folder: Path, tokenizer: Tokenizer, findings: list[Finding]) -> None:
    """A tokenizer.json beside tokenizer.model: other tools read that one, so it must give the same ids."""
    if not ((folder / "tokenizer.model").exists() and (folder / "tokenizer.json").exists()):
        return
    from internlm2.doctor.probes import PROBES
    from internlm2.tokenizer.tokenizers_backend import TokenizersBackend

    remedy = "Delete tokenizer.json, or make a right one: `internlm2 model export ... --to llama` writes it."
    try:
        other = TokenizersBackend.from_file(folder / "tokenizer.json")
    except InternLM2Error as error:
        findings.append(Finding("tokenizer.json", "wrong", str(error), remedy))
        return
    wrong = [text for text in PROBES if other.encode_ordinary(text) != tokenizer.encode(text)]
    if wrong:
        text = f"{len(wrong)} of {len(PROBES)} probe texts get other ids than from tokenizer.model, e.g. {wrong[0]!r}."
        findings.append(Finding("tokenizer.json", "wrong", text, remedy))
    else:
        findings.append(Finding("tokenizer.json", "ok", "gives the ids of tokenizer.model"))


def _stops(folder: Path, tokenizer: Tokenizer, findings: list[Finding]) -> None:
    marker = tokenizer.special_tokens.get(IM_END)
    path = folder / "generation_config.json"
    if marker is None:
        findings.append(
            Finding("stop tokens", "note", f"no {IM_END} in the vocabulary, so this is no chat model.")
        )
        return
    wanted = sorted(tokenizer.stop_ids)
    remedy = f'Put "eos_token_id": {json.dumps(wanted)} into generation_config.json.'
    if not path.exists():
        text = f"no generation_config.json: other tools do not know that {marker} ends a turn (here it always does)."
        findings.append(Finding("stop tokens", "note", text, remedy))
        return
    try:
        eos = read_json(path).get("eos_token_id")
    except InternLM2Error as error:
        findings.append(Finding("stop tokens", "wrong", str(error), remedy))
        return
    ids = eos if isinstance(eos, list) else [eos]
    if marker in ids:
        findings.append(Finding("stop tokens", "ok", f"generation_config.json ends at {ids}"))
    else:
        text = f"generation_config.json ends at {ids} only: generate() of other tools runs past {IM_END} ({marker})."
        findings.append(Finding("stop tokens", "wrong", text, remedy))


def _template(folder: Path, tokenizer: Tokenizer, findings: list[Finding]) -> None:
    try:
        template = folder_template(folder)
    except InternLM2Error:  # the tokenizer's finding tells of a damaged tokenizer_config.json
        template = None
    if template is None:
        findings.append(
            Finding(
                "chat template", "note", "none in the folder; this package has its own, other tools do not."
            )
        )
        return
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        findings.append(
            Finding("chat template", "note", "not compared: jinja2 is absent.", "pip install 'internlm2[hf]'")
        )
        return
    bos = "" if tokenizer.bos_id is None else tokenizer.decode([tokenizer.bos_id])
    try:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        found = environment.from_string(template).render(
            messages=PLAIN_TURNS, add_generation_prompt=True, bos_token=bos, eos_token="</s>"
        )
    except Exception as error:
        # A template is a stranger's program; whatever it raises means that it cannot be used.
        findings.append(Finding("chat template", "wrong", f"does not render: {error}", "Take a newer one."))
        return
    for old, new in OLD_SPELLINGS.items():  # the same ids under the names of January 2024
        found = found.replace(old, new)
    expected = tokenizer.render_chat(PLAIN_TURNS)
    if found == expected:
        findings.append(Finding("chat template", "ok", "renders plain turns as the documented format"))
    elif found == expected.removeprefix(bos):
        text = "leaves out BOS, as the first revision did: tools that trust it start without token 1."
        findings.append(Finding("chat template", "wrong", text, "Put {{ bos_token }} at its start."))
    else:
        text = f"renders {found!r}, but the documented format is {expected!r}."
        findings.append(Finding("chat template", "wrong", text, "Take the template of the model's page."))


def is_model_folder(folder: Path) -> bool:
    """Whether transformers could be asked about it."""
    return folder.is_dir() and (folder / CONFIG_FILE).exists()
