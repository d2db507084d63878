"""The libraries of the extra `eval`, imported where a score needs them and nowhere else."""

import importlib
from types import ModuleType

from internlm2.errors import MissingDependencyError


def library(name: str, what: str) -> ModuleType:
    """The module `name`. what: needs it, for the message. Raises MissingDependencyError where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs {name}, which is not installed. Install it with: pip install 'internlm2[eval]'"
        ) from error
