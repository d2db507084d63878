"""The real InternLM2 vocabulary, raw sentencepiece beside it, and small vocabularies of other kinds."""

import json
from pathlib import Path

import pytest
import sentencepiece
from vocabularies import DATA, byte_level_folder

from internlm2 import Tokenizer
from internlm2.tokenizer import export


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return Tokenizer.from_pretrained(DATA)


@pytest.fixture(scope="session")
def raw() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tokenizer.model"))


@pytest.fixture(scope="session")
def golden() -> list[tuple[str, list[int]]]:
    lines = (DATA / "ids.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["text"], line["ids"]) for line in map(json.loads, lines)]


@pytest.fixture(scope="session")
def exported(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers gets it: tokenizer.json and no tokenizer.model."""
    folder = tmp_path_factory.mktemp("exported")
    export.save_tokenizer(tok, folder, for_transformers=True)
    return folder


@pytest.fixture(scope="session")
def from_json(exported: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(exported)


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(byte_level_folder(tmp_path_factory.mktemp("byte_level")))
