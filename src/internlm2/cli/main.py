"""`internlm2`: the words that the user types. Commands load when called, so that `--help` is quick.

Exit codes: 0 done, 1 our bug (with a traceback) or a finding of `doctor`, 2 something the user can mend,
130 interrupted.
"""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App, CycloptsError

from internlm2 import __version__, log
from internlm2.errors import InternLM2Error

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130

app = App(
    name="internlm2",
    suppress_keyboard_interrupt=False,  # `run` answers it
    help="Run, convert and examine InternLM2 and InternLM2.5 models. "
    "A MODEL is a folder, a GGUF file, a Hugging Face id, or `demo`.",
    version=f"internlm2 {__version__}",
    help_epilogue="Examples:\n\n  internlm2 chat demo\n\n  internlm2 generate demo 'The capital of France is'\n\n"
    "  internlm2 doctor path/to/internlm2-chat-7b",
)
app.command("internlm2.cli.chat:chat", help="Talk to a model. Piped input works too: each line is a message.")
app.command(
    "internlm2.cli.generate:generate",
    help="Complete a prompt, or answer one message; both may be piped.",
)
app.command("internlm2.cli.serve:serve", help="Serve a model over HTTP, as OpenAI's API.")
app.command("internlm2.cli.serve:key", help="Make an API key for `serve`.")
app.command("internlm2.cli.agent:agent", help="Answer questions with tools: calculator, Python, files, MCP.")
app.command("internlm2.cli.bench:bench", help="Measure speed and memory of a model on this machine.")
app.command(
    "internlm2.cli.doctor:doctor", help="Examine your installation and a model folder. Exit code 1: wrong."
)
model_app = App(name="model", help="Download, examine, convert and export models.", help_epilogue="")
model_app.command("internlm2.cli.model:download", help="Fetch a model, continuing an earlier try.")
model_app.command("internlm2.cli.model:info", help="Sizes, parameters and memory of a model.")
model_app.command("internlm2.cli.model:convert", help="Any format to an official InternLM2 folder.")
model_app.command("internlm2.cli.model:quantize", help="A model with int8 or int4 weights, for others too.")
model_app.command("internlm2.cli.model:cache", help="Show or remove packed weights that are kept on disk.")
model_app.command("internlm2.cli.model:export", help="A model to another format: llama, gguf, internevo.")
app.command(model_app)
eval_app = App(name="eval", help="Benchmarks as the model card ran them.", help_epilogue="")
eval_app.command("internlm2.cli.eval:prompt", help="The exact prompt of one benchmark item.")
eval_app.command(
    "internlm2.cli.eval:data", help="Which benchmark files are needed, there or missing; import them."
)
eval_app.command("internlm2.cli.eval:run", help="Evaluate a model, or go on with a run that was begun.")
eval_app.command("internlm2.cli.eval:show", help="Samples of a run: prompt, answer and verdict.")
eval_app.command("internlm2.cli.eval:table", help="The model card's table for one or more runs.")
eval_app.command("internlm2.cli.cost:cost", help="How many tokens and hours a run will take.")
eval_app.command("internlm2.cli.report:report", help="One HTML file to browse runs with.")
eval_app.command("internlm2.cli.report:plot", help="Scores as bars; needle tests as maps and curves.")
eval_app.command("internlm2.cli.shards:merge", help="One run of the shards of several machines.")
eval_app.command(
    "internlm2.cli.contamination:contamination", help="Whether a model has seen a benchmark: losses compared."
)
eval_app.command("internlm2.cli.harness:lm_eval", help="lm-evaluation-harness on our engine.", help_flags=())
eval_app.command("internlm2.cli.perplexity:perplexity", help="Perplexity of texts, by token, word and byte.")
app.command(eval_app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    _prepare_streams()
    log.configure(verbosity=1 if os.environ.get("INTERNLM2_DEBUG") else 0)
    # NOTE: before torch loads OpenMP. Its threads spin for long while they wait, and decoding collapses as soon as
    # another program wants a core; a short spin keeps most of the speed in both cases (results/threads.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    sys.exit(run(arguments))


def _prepare_streams() -> None:
    """Streams that are closed lead nowhere; text is UTF-8, and what a terminal cannot show is replaced."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run(arguments: Sequence[str] | None = None) -> int:  # noqa: PLR0911 - one for each way to end
    """As `main`, but returns the exit code."""
    try:
        result = app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError:
        return USER_ERROR  # cyclopts has printed what is wrong and what is known
    except InternLM2Error as error:
        print(f"Error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; a second complaint at exit would only be noise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # What the rooms could not foresee: a folder that may not be read, a full disk behind standard output.
        print(f"Error: {error.filename or 'output'}: {error.strerror or error}.", file=sys.stderr)
        return USER_ERROR
    except SystemExit:  # rich leaves this way when the reader of a help page is gone
        return 0
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    main()
