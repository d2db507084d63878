"""What the pages say happens: their commands run, their Python runs, their links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [*READMES, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def demo_commands(page: Path) -> list[str]:
    """Lines that run `internlm2` on something that is there without a hub."""
    lines = [line.partition("  #")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()]
    known = re.compile(
        r"\binternlm2 (chat|generate|bench|doctor|model info) (demo|7b)\b|\| internlm2 generate demo"
    )
    return [line for line in lines if known.search(line)]


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_readme_commands_run(page, demo):
    commands = demo_commands(page)
    assert len(commands) >= 5
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, stdin=subprocess.DEVNULL,
            env=environment, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_readme_python_runs(page, demo):
    scripts = blocks(page, "python")
    assert len(scripts) == 5
    for script in scripts:
        short = script.replace(
            "stream_chat([", "stream_chat(params=internlm2.SamplingParams(max_tokens=8), messages=["
        )
        done = subprocess.run(
            [sys.executable, "-c", short], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{script}\n{done.stderr}"


def test_both_readmes_have_the_same_commands_code_links_and_figures():
    english, chinese = (page.read_text(encoding="utf-8") for page in READMES)
    for pattern in (r"^```python\n(.*?)^```", r"\]\((?!README)([^)]+)\)"):
        assert _code(re.findall(pattern, english, flags=re.M | re.S)) == _code(
            re.findall(pattern, chinese, flags=re.M | re.S)
        )
    assert [shlex.split(c)[:3] for c in demo_commands(READMES[0])] == [
        shlex.split(c)[:3] for c in demo_commands(READMES[1])
    ]
    figures = [sorted(re.findall(r"\d+(?:\.\d+)+", text)) for text in (english, chinese)]
    assert figures[0] == figures[1]


def _code(parts: list[str]) -> list[str]:
    """Without comments and texts, which are translated."""
    return [re.sub(r'#.*|"[^"]*"', "", part) for part in parts]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    for words in set(re.findall(r"internlm2 (model (?:\w+)|chat|generate|doctor)", text)):
        done = subprocess.run(
            [sys.executable, "-m", "internlm2", *words.split(), "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, words
