"""`internlm2 chat`: a conversation in the terminal, or from a pipe with one message a line."""

import sys
from collections.abc import Iterator
from typing import Annotated

from cyclopts import Parameter

from internlm2.cli import options
from internlm2.cli.main import USER_ERROR
from internlm2.cli.options import RunFlags
from internlm2.cli.session import COMMANDS, ChatSession

WELCOME = "Type a message; /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves."


def chat(
    model: Annotated[str, Parameter(help="Folder, GGUF file, Hugging Face id, or `demo`.")] = "demo",
    *,
    system: Annotated[str | None, Parameter(help="System message that opens the conversation.")] = None,
    flags: RunFlags | None = None,
) -> int:
    """Talk to a model. Piped input works too: each line is a message or a command."""
    config = options.resolve(flags)
    params = options.sampling(config)
    session = ChatSession(
        options.load_llm(model, config), params, system=system, adapter=options.adapter_name(config)
    )
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _enable_line_editing()
        print(WELCOME, file=sys.stderr)
    all_answered = True
    for line in _lines(is_terminal):
        if line.startswith("/"):
            if not session.command(line):
                break
        elif line.strip():
            all_answered &= session.answer(line)
    return 0 if all_answered or is_terminal else USER_ERROR


def _enable_line_editing() -> None:
    try:
        import readline
    except ImportError:  # not on Windows; input() works without history there
        return
    readline.set_history_length(500)
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, n: [*[c for c in COMMANDS if c.startswith(text)], None][n])
    readline.parse_and_bind("tab: complete")


def _lines(is_terminal: bool) -> Iterator[str]:
    """Messages until the end of input. On a terminal a trailing backslash goes on with the next line."""
    while True:
        try:
            line = input("> ") if is_terminal else _next_piped()
            while is_terminal and line.endswith("\\"):
                line = line[:-1] + "\n" + input(". ")
        except EOFError:
            if is_terminal:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n(Ctrl-D or /quit leaves.)", file=sys.stderr)
            continue
        yield line


def _next_piped() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
