"""What belongs into a data folder: every file with its sha256 (`files.tsv`), and where each benchmark comes from.

The sums are those of the OpenCompass data pack of 2023/24 where it is known. Of MMLU and MATH only copies of equal
content could be compared; another spelling of the same rows is therefore no error, but it is told.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Source:
    """Where the data of a benchmark comes from. hub: on Hugging Face, "" where no parquet fits."""

    licence: str
    url: str
    hub: str = ""
    note: str = ""


SOURCES: Mapping[str, Source] = {
    "mmlu": Source("MIT", "https://people.eecs.berkeley.edu/~hendrycks/data.tar", "cais/mmlu"),
    "agieval": Source(
        "MIT; per set: data/v1/LICENSE (AQuA Apache-2.0, LogiQA and JEC-QA own terms)",
        "https://github.com/ruixiangcui/AGIEval/tree/b1187aad",
        note="the state of June 2023: ten sets changed later",
    ),
    "bbh": Source("MIT", "https://github.com/suzgunmirac/BIG-Bench-Hard", "lukaemon/bbh"),
    "gsm8k": Source("MIT", "https://github.com/openai/grade-school-math", "openai/gsm8k"),
    "math": Source("MIT", "https://github.com/hendrycks/math", "EleutherAI/hendrycks_math"),
    "humaneval": Source("MIT", "https://github.com/openai/human-eval", "openai/openai_humaneval"),
    "sanitized_mbpp": Source(
        "CC-BY-4.0",
        "https://github.com/google-research/google-research/tree/master/mbpp",
        "google-research-datasets/mbpp",
    ),
    "shots": Source(
        "Apache-2.0",
        "https://github.com/open-compass/opencompass",
        note="the worked examples in its configs/datasets; `--from` a checkout or the installed package finds them",
    ),
    "ceval": Source("CC-BY-NC-SA-4.0", "https://cevalbenchmark.com", "ceval/ceval-exam"),
    "cmmlu": Source("CC-BY-NC-4.0", "https://github.com/haonan-li/CMMLU", "haonan-li/cmmlu"),
    "needle": Source(
        "Skywork Community License; vocabulary MIT",
        "https://github.com/SkyworkAI/Skywork (its history) and "
        "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken",
        note="for the profile `fixed` put the model's tokenizer.model or tokenizer.json into needle/",
    ),
    "needle_en": Source(
        "essays (c) Paul Graham", "https://github.com/gkamradt/LLMTest_NeedleInAHaystack/tree/7b90d285"
    ),
    "needlebench": Source("Apache-2.0", "https://huggingface.co/datasets/opencompass/NeedleBench"),
    "longbench": Source(
        "MIT; per source own terms",
        "https://huggingface.co/datasets/THUDM/LongBench",
        note="the two files of prompts and lengths are in LongBench/config of https://github.com/THUDM/LongBench",
    ),
    "leval": Source("GPL-3.0", "https://github.com/OpenLMLab/LEval/tree/cd34b050/LEval-data"),
    "ifeval": Source(
        "Apache-2.0",
        "https://github.com/google-research/google-research/tree/master/instruction_following_eval",
    ),
}
"""By benchmark; "shots" are the worked examples of GSM8K, MATH and MBPP, which stand in OpenCompass' code."""
OPTIONAL = frozenset(("ceval", "cmmlu", "needle", "needle_en", "needlebench", "longbench", "leval", "ifeval"))
"""Benchmarks that are not on the model card; their files may be missing."""
PACK_URL = "https://github.com/open-compass/opencompass/releases (OpenCompassData-core)"


@dataclass(frozen=True)
class PublishedFile:
    """One file of a data folder. num_bytes and sha256 are 0 and "" where they are not known."""

    benchmark: str
    name: str
    num_bytes: int
    sha256: str
    is_pack: bool  # the sum is that of the OpenCompass pack, not of a copy with equal content


@dataclass(frozen=True)
class Subject:
    """A subject of MMLU, C-Eval or CMMLU. title: its Chinese name. groups: whose averages it counts to."""

    name: str
    title: str
    groups: tuple[str, ...]


def published_files() -> tuple[PublishedFile, ...]:
    """Every file, in the order of the benchmarks; of C-Eval and CMMLU only the names are known."""
    known = [
        PublishedFile(row["benchmark"], row["name"], int(row["bytes"]), row["sha256"], row["pack"] == "yes")
        for row in _rows("files.tsv")
    ]
    for subject in subjects("ceval"):
        names = [f"ceval/formal_ceval/{split}/{subject.name}_{split}.csv" for split in ("dev", "val")]
        known += [PublishedFile("ceval", name, 0, "", False) for name in names]
    for subject in subjects("cmmlu"):
        names = [f"cmmlu/{split}/{subject.name}.csv" for split in ("dev", "test")]
        known += [PublishedFile("cmmlu", name, 0, "", False) for name in names]
    return tuple(known)


def subjects(benchmark: str) -> tuple[Subject, ...]:
    """The subjects of "mmlu", "ceval" or "cmmlu", in OpenCompass' order."""
    return tuple(
        Subject(row["name"], row["title"], tuple(row["groups"].split(",")))
        for row in _rows("subjects.tsv")
        if row["benchmark"] == benchmark
    )


def _rows(name: str) -> list[dict[str, str]]:
    text = files("internlm2.eval.data").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
