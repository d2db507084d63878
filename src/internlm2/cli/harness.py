"""`internlm2 eval lm-eval`: lm-evaluation-harness with our engine among its models."""

from typing import Annotated

from cyclopts import Parameter


def lm_eval(
    *arguments: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help="As behind the command lm_eval, such as --model internlm2 --model_args pretrained=demo --tasks gsm8k.",
        ),
    ],
) -> int:
    """Run lm-evaluation-harness with the model `internlm2`; --help is the one of lm_eval."""
    from internlm2.eval.bridge import main

    try:
        main(arguments)
    except SystemExit as end:  # argparse leaves this way, after help and after mistakes
        return end.code if isinstance(end.code, int) else 0
    return 0
