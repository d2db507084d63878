"""The demo model on the card's seven benchmarks: the run, its table, its page and its picture in `results/`.

Run: python benchmarks/eval_demo.py --data ../shared/data/benchmarks --folder /tmp/eval_demo. It is `internlm2 eval run`
with the settings below; stopped at any time it goes on where it was, and with a larger --limit it grows. The table is
written when all questions of the limit are answered.
"""

import argparse
from pathlib import Path

from hardware import RESULTS, header

from internlm2.cli import main as cli
from internlm2.eval.table import FinishedRun, table

TITLE = "The demo model on the benchmarks of the model card"
# 57 subjects of MMLU, 21 sets of AGIEval, 27 tasks of BBH: so many of each; the others have one set each.
LIMIT = "8,gsm8k=150,math=120,humaneval=164,sanitized_mbpp=128"
MAX_PAGE_MB = 0.9


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--folder", type=Path, required=True, help="of the run")
    parser.add_argument("--limit", default=LIMIT, help="as `internlm2 eval run` takes it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "eval_demo", help="without .md, .html, .svg")
    return parser.parse_args()


def main() -> None:
    """Run, and write the result files."""
    given = arguments()
    settings = ["--profile", "card-2024-02", "--quantization", "bfloat16", "--early-stop", "--seed", "0"]
    settings += ["--limit", given.limit]
    where = ["--data", str(given.data), "--output", str(given.folder), "--threads", str(given.threads)]
    code = cli.run(["eval", "run", "demo", *settings, *where])
    if code:
        raise SystemExit(code)
    page, picture = given.output.with_suffix(".html"), given.output.with_suffix(".svg")
    for words in (
        ["report", str(given.folder), "--out", str(page), "--max-mb", str(MAX_PAGE_MB)],
        ["plot", str(given.folder), "--out", str(picture)],
    ):
        if code := cli.run(["eval", *words]):
            raise SystemExit(code)
    run = FinishedRun.load(given.folder)
    text = header(
        TITLE, f"python benchmarks/eval_demo.py --data DATA --folder RUN --limit {given.limit}", ("torch",)
    )
    text += f"`internlm2 eval run demo {' '.join(settings)} --data DATA --output RUN`\n\n"
    text += (
        f"All answers: [{page.name}]({page.name}). The demo model has 135M parameters; one of four options is right by "
        "chance in 25 %. The card's column is that of the 7B model. Seconds are those between answers.\n\n"
    )
    given.output.with_suffix(".md").write_text(f"{text}{table([run], form='markdown')}\n{tasks_table(run)}")
    print(given.output.with_suffix(".md").read_text())


def tasks_table(run: FinishedRun) -> str:
    """Questions, tokens, and prompts and answers that were cut, by task."""
    lines = [
        "",
        "| task | questions | without verdict | prompt tokens | answer tokens | cut prompts | cut answers | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, task in run.results.tasks.items():
        counts = (
            task.num_questions, task.num_errors, task.prompt_tokens, task.output_tokens,
            task.num_cut_prompts + task.num_dropped_shots, task.num_cut_answers, round(task.seconds),
        )  # fmt: skip
        lines.append(f"| {name} | {' | '.join(f'{count:,}' for count in counts)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
