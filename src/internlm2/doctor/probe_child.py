"""Runs in a process of its own, so that transformers is seen as a user's program would find it.

Reads one JSON request from standard input and prints one JSON answer. Remote code stays off throughout.
"""

import json
import sys
from typing import Any

MARKERS = ("<|im_start|>", "<|im_end|>")


def main() -> None:
    """Answer the request; any failure is an answer too."""
    request = json.load(sys.stdin)
    try:
        if request["with_hf"]:
            import internlm2.hf  # noqa: F401 - registers the classes
        answer = {"tokenizer": ask_tokenizer, "model": ask_model}[request["task"]](request)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        answer = {"error": f"{type(error).__name__}: {lines[0]}"}
    print(json.dumps(answer))


def ask_tokenizer(request: dict[str, Any]) -> dict[str, object]:
    """Ids and decoded texts of the probes, and the ids of the chat markers."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(request["folder"], trust_remote_code=False)
    ids = [tokenizer(text)["input_ids"] for text in request["probes"]]
    return {
        "ids": ids,
        "decoded": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "markers": {marker: tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS},
    }


def ask_model(request: dict[str, Any]) -> dict[str, object]:
    """Logits of a fixed prompt, and how many buffers the model has."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(3, 35)[None]).logits[0]
    return {"logits": logits.tolist(), "buffers": len(list(model.buffers()))}


if __name__ == "__main__":
    main()
