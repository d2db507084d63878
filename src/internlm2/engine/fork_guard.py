"""A loaded model stays in the process that loaded it: neither threads nor locks nor worker processes survive a fork.

A forked child that asked it would wait for ever for a thread that it does not have.
"""

import os

from internlm2.errors import RequestError


class ForkGuard:
    """Remembers the process that it was made in."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_at_home(self) -> bool:
        """Whether this is the process that the guard was made in, not a fork of it."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raise RequestError in a forked child. Call it before any lock is taken: another thread may have held that."""
        if not self.is_at_home:
            raise RequestError(
                f"This model was loaded by process {self._pid}, and this is a fork of it (process {os.getpid()}), "
                "which has none of its threads. Load the model in the new process, started with "
                "multiprocessing.get_context('spawn'), or serve one model to all with `internlm2 serve`."
            )
