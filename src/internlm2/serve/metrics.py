"""Numbers for Prometheus. One registry for each server, so that two in one process do not mix."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from internlm2.engine.frontend import Frontend
from internlm2.serve.gate import Gate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """What a server counts, and the text that it shows."""

    def __init__(self, frontend: Frontend, gate: Gate) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "internlm2_requests", "Requests by path and status.", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "internlm2_request_seconds",
            "From the head of a request to the end of its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "internlm2_first_token_seconds",
            "From the head of a request to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_EngineNumbers(frontend, gate))

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineNumbers:
    """Read off the engine when they are asked for."""

    def __init__(self, frontend: Frontend, gate: Gate) -> None:
        self._frontend = frontend
        self._gate = gate

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        engine = self._frontend.engine
        stats, pool = engine.stats, engine.scheduler.pool
        counters = {
            "steps": (stats.num_steps, "Steps of the engine."),
            "prompt_tokens": (stats.num_prompt_tokens, "Tokens of prompts that were computed."),
            "cached_tokens": (stats.num_cached_tokens, "Tokens of prompts that were computed before."),
            "output_tokens": (stats.num_output_tokens, "Tokens of answers."),
            "drafted_tokens": (stats.num_drafted_tokens, "Tokens that were guessed."),
            "accepted_tokens": (stats.num_accepted_tokens, "Guessed tokens that were right."),
            "preemptions": (stats.num_preemptions, "Sequences that gave their memory to others."),
            "step_seconds": (stats.step_seconds, "Time spent in steps."),
        }
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"internlm2_{name}", text, value=value)
        gauges = {
            "open_answers": (self._gate.num_open, "Answers that are asked for and not complete."),
            "pages_held": (pool.num_held, "Pages of keys and values that open sequences hold."),
            "is_draining": (int(self._gate.is_draining), "Whether the server is about to end."),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"internlm2_{name}", text, value=value)
