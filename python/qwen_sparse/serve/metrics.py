"""Prometheus metrics: vLLM's names and meanings with the prefix ``qwen_sparse:``, and the density of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .requests import Failed, Finished

if TYPE_CHECKING:
    from .engine import Snapshot

__all__ = ["Metrics"]

_PREFIX = "qwen_sparse:"
# Bounds of vLLM's histograms, so that dashboards made for it fit.
# fmt: off
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
                640, 2560)
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_DENSITY = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999, 1)
# fmt: on


class Metrics:
    """What happened since the server started, and what the engine is doing now.

    Args:
        model_name: the label ``model_name`` of every metric.
        max_model_len: the largest bound of the histograms of tokens.
        snapshot: asked at each scrape.
    """

    def __init__(self, model_name: str, max_model_len: int, snapshot: Callable[[], Snapshot]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, snapshot))

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            family = Histogram(_PREFIX + name, text, ("model_name",), buckets=tuple(buckets), registry=self._registry)
            return family.labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(_PREFIX + name, text, ("model_name",), registry=self._registry).labels(model_name)

        tokens = [m * 10**e for e in range(7) for m in (1, 2, 5) if m * 10**e <= max_model_len]
        self._first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN
        )
        self._inter_token = histogram("inter_token_latency_seconds", "Between two tokens of a request.", _TOKEN)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Of a request, mean time per token behind the first.", _TOKEN
        )
        self._latency = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", _REQUEST)
        self._queue = histogram("request_queue_time_seconds", "In the queue.", _REQUEST)
        self._prefill = histogram("request_prefill_time_seconds", "From the queue to the first token.", _REQUEST)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.", _REQUEST)
        self._inference = histogram("request_inference_time_seconds", "From the queue to the end.", _REQUEST)
        self._prompt_lengths = histogram("request_prompt_tokens", "Tokens of a request's prompt.", tokens)
        self._answer_lengths = histogram("request_generation_tokens", "Tokens of a request's answer.", tokens)
        self._density = histogram(
            "request_attention_density", "Attended over causal pairs of a request's prefill.", _DENSITY
        )
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were answered, cached ones included.")
        self._answer_tokens = counter("generation_tokens", "Generated tokens.")
        finished = Counter(
            _PREFIX + "request_success",
            "Requests that ended, by how: also abort (the client left) and error.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._finished = {
            reason: finished.labels(model_name, reason) for reason in ("stop", "length", "abort", "error")
        }

    def token(self, since: float, *, first: bool) -> None:
        """A token was generated, ``since`` seconds after the one before, or after the request's arrival."""
        (self._first_token if first else self._inter_token).observe(since)
        self._answer_tokens.inc()

    def ended(self, event: Finished | Failed, latency: float) -> None:
        """A request has ended, ``latency`` seconds after it arrived."""
        stats = event.stats
        self._finished[event.reason if isinstance(event, Finished) else "error"].inc()
        self._latency.observe(latency)
        self._queue.observe((stats.finished if stats.scheduled is None else stats.scheduled) - stats.arrived)
        if stats.scheduled is None:
            return
        self._inference.observe(stats.finished - stats.scheduled)
        if stats.first_token is None:
            return
        self._prefill.observe(stats.first_token - stats.scheduled)
        self._decode.observe(stats.finished - stats.first_token)
        if stats.completion_tokens > 1:
            self._per_token.observe((stats.finished - stats.first_token) / (stats.completion_tokens - 1))
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._prompt_lengths.observe(stats.prompt_tokens)
        self._answer_lengths.observe(stats.completion_tokens)
        if stats.density is not None:
            self._density.observe(stats.density)

    def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, model_name: str, snapshot: Callable[[], Snapshot]) -> None:
        self._model_name, self._snapshot = model_name, snapshot

    def describe(self) -> Iterable[Metric]:
        return []  # or the registry would ask the engine at once

    def collect(self) -> Iterable[Metric]:
        now = self._snapshot()
        for name, text, value in (
            ("num_requests_running", "Requests that are prefilled or decoded.", now.running),
            ("num_requests_waiting", "Requests in the queue.", now.waiting),
            ("kv_cache_usage_perc", "Pages of running requests over all, 1 is all of them.", now.kv_cache_usage),
        ):
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=("model_name",))
            gauge.add_metric((self._model_name,), value)
            yield gauge
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache.", now.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens that were found in the prefix cache.", now.prefix_hits),
            ("num_preemptions", "How often a running request had to give its pages back.", now.preemptions),
        ):
            counter = CounterMetricFamily(_PREFIX + name, text, labels=("model_name",))
            counter.add_metric((self._model_name,), value)
            yield counter
