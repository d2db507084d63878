"""The error family: one child of `InternLM2Error` for each kind of thing that a user can put right.

A message says what was given, what is allowed and what to do. `assert` is for our own bugs.
The command line prints these without a traceback and leaves with exit code 2.
"""


class InternLM2Error(Exception):
    """Something the user can fix; the text says how."""


class ConfigError(InternLM2Error):
    """A configuration value or key that is unknown, of the wrong type, or contradicts another."""


class CheckpointError(InternLM2Error):
    """A model folder or weight file that is missing, damaged, incomplete or unsafe."""


class TokenizerError(InternLM2Error):
    """Tokenizer files that are missing or damaged, or ids outside the vocabulary."""


class ChatError(InternLM2Error):
    """Messages that do not form a conversation: unknown role, missing content, bad tool call."""


class ExportError(InternLM2Error):
    """Output that cannot be written: no space, no permission, folder in use, format cannot hold it."""


class DownloadError(InternLM2Error):
    """A download that failed, was cut off, or whose content is not what was published."""


class MemoryBudgetError(InternLM2Error):
    """A model or context that does not fit in the memory of this machine; told before loading."""


class MissingDependencyError(InternLM2Error):
    """An optional package that this feature needs; the text holds the pip command."""


class RequestError(InternLM2Error):
    """A generation request that cannot be served as asked: sampling values, lengths, devices."""


def check(is_good: bool, name: str, value: object, allowed: str) -> None:
    """Raise RequestError unless `is_good`: the one sentence for values outside what `allowed` says."""
    if not is_good:
        raise RequestError(f"{name} is {value!r}, but must be {allowed}.")
