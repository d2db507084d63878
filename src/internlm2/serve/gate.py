"""Who may ask now: a bounded number of open requests, a share for each key, and the end of the server.

The engine queues what it cannot run at once. The gate keeps that queue short, so that a client learns at once when it
would wait for long.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from internlm2.serve import errors
from internlm2.serve.errors import BAD_REQUEST, TOO_MANY, ApiError
from internlm2.serve.settings import ServeSettings

_NEWEST_SHARE = 0.2  # of the newest answer in the mean of how long answers take
_MAX_RETRY_SECONDS = 60


class Slot:
    """A place for the answers of one request. `release` gives it back; a second call does nothing."""

    def __init__(self, gate: "Gate", key: str | None, count: int) -> None:
        self._gate = gate
        self._key = key
        self._count = count
        self._started = time.monotonic()
        self._is_held = True

    def release(self) -> None:
        """Give the place back."""
        if self._is_held:
            self._is_held = False
            self._gate.leave(self._key, self._count, seconds=time.monotonic() - self._started)


class Gate:
    """Counts open answers. For one event loop."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._open_by_key: Counter[str | None] = Counter()
        self._deadlines: set[asyncio.Timeout] = set()
        self._mean_seconds = 1.0
        self.num_open = 0
        self.is_draining = False

    def enter(self, key: str | None, count: int = 1) -> Slot:
        """A place for `count` answers. Raises ApiError: 400 for more than there can be, 429, or 503 at the end."""
        settings = self._settings
        capacity = settings.max_running + settings.max_queue
        share = capacity if key is None else min(capacity, settings.max_per_key)
        if count > share:
            raise ApiError(
                BAD_REQUEST,
                f"The request asks for {count} answers, but {share} may be open at once. Ask for fewer.",
                code="too_many_answers",
            )
        if self.is_draining:
            raise errors.closing()
        if self.num_open + count > capacity:
            raise self._refusal(f"All {capacity} places of this server are taken.", "server_busy")
        if key is not None and self._open_by_key[key] + count > share:
            raise self._refusal(f"This key has {share} answers open already.", "rate_limit_exceeded")
        self.num_open += count
        self._open_by_key[key] += count
        return Slot(self, key, count)

    def leave(self, key: str | None, count: int, *, seconds: float) -> None:
        """An answer is over; `Slot.release` calls this."""
        self.num_open -= count
        self._open_by_key[key] -= count
        if not self._open_by_key[key]:
            del self._open_by_key[key]
        self._mean_seconds += _NEWEST_SHARE * (seconds - self._mean_seconds)

    @asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Bound the time of what is inside. Raises ApiError when it is over, or when the server cannot wait."""
        try:
            async with asyncio.timeout(self._settings.request_seconds) as deadline:
                self._deadlines.add(deadline)
                try:
                    yield
                finally:
                    self._deadlines.discard(deadline)
        except TimeoutError as error:
            if self.is_draining:
                raise errors.closing() from error
            raise errors.too_slow(self._settings.request_seconds) from error

    def drain(self) -> None:
        """Take nothing new; what is open has `drain_seconds` left."""
        if self.is_draining:
            return
        self.is_draining = True
        end = asyncio.get_running_loop().time() + self._settings.drain_seconds
        for deadline in self._deadlines:
            planned = deadline.when()
            if not deadline.expired() and (planned is None or planned > end):
                deadline.reschedule(end)

    def _refusal(self, message: str, code: str) -> ApiError:
        rounds = self.num_open / self._settings.max_running
        seconds = min(_MAX_RETRY_SECONDS, max(1, math.ceil(self._mean_seconds * rounds)))
        return ApiError(
            TOO_MANY,
            f"{message} Try again in {seconds} s.",
            kind="rate_limit_error",
            code=code,
            headers={"retry-after": str(seconds)},
        )
