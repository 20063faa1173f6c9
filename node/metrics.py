"""What a node counts, in the Prometheus text format. One registry per node, nothing global.

Gauges are read from the node at the moment of the scrape; nothing has to keep them in step. Counters of other
parts (network, round) are dataclasses of integers, each field a counter of its own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from node.service import NodeStatus, Service

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FINALITY_BUCKETS_SECONDS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_REQUEST_BUCKETS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 10.0, 60.0)


class Metrics:
    """A node's metrics."""

    def __init__(self, service: Service, counters: "Mapping[str, DataclassInstance] | None" = None) -> None:
        """``counters``: dataclasses of integers by the name that stands before their fields, e.g. ``network``."""
        self._registry = CollectorRegistry()
        self._registry.register(_NodeCollector(service, counters or {}))
        ProcessCollector(registry=self._registry)
        self._submitted = Counter("countersign_events_submitted", "Events taken over HTTP.", registry=self._registry)
        self._rejected = Counter(
            "countersign_events_rejected", "Events refused over HTTP.", ["reason"], registry=self._registry
        )
        self._finality = Histogram(
            "countersign_finality_seconds",
            "From an event's submission here to its durable finality here.",
            buckets=_FINALITY_BUCKETS_SECONDS,
            registry=self._registry,
        )
        self._requests = Histogram(
            "countersign_http_request_seconds",
            "HTTP requests by endpoint and status.",
            ["method", "endpoint", "status"],
            buckets=_REQUEST_BUCKETS_SECONDS,
            registry=self._registry,
        )

    def event_submitted(self) -> None:
        """An event was taken."""
        self._submitted.inc()

    def event_rejected(self, reason: str) -> None:
        """An event was refused."""
        self._rejected.labels(reason).inc()

    def event_final(self, seconds: float) -> None:
        """An event submitted here became final so long after."""
        self._finality.observe(seconds)

    def request_answered(self, method: str, endpoint: str, status: int, seconds: float) -> None:
        """``endpoint`` is a template, never a path: the number of labels must not be the client's choice."""
        self._requests.labels(method, endpoint, str(status)).observe(seconds)

    def render(self) -> bytes:
        """The text Prometheus scrapes."""
        return generate_latest(self._registry)


class _NodeCollector(Collector):
    def __init__(self, service: Service, counters: "Mapping[str, DataclassInstance]") -> None:
        self._service = service
        self._counters = counters

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: registering must not read the node."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The node now."""
        now = self._service.snapshot()
        for name, value, meaning in (
            ("log_size", now.log_size, "Events on the finalized log."),
            ("height", now.height, "Newest final ledger block."),
            ("view", now.view, "View of the BFT round."),
            ("mempool_events", now.mempool_events, "Events that wait."),
            ("mempool_bytes", now.mempool_bytes, "Bytes of the events that wait."),
            ("peers_connected", len(now.peers_connected), "Members connected."),
            ("peers", now.peers_total, "Other members."),
            ("voting", int(now.voting), "1 while this member votes."),
            ("halted", int(bool(now.halted)), "1 once the node has stopped for good."),
            ("catching_up", int(now.catching_up), "1 while the node is behind."),
            ("log_missing_blocks", now.log_missing, "Ledger blocks not fetched yet below the snapshot it began at."),
            ("evidence", now.evidence, "Members, epochs and offences for which the log holds evidence."),
            ("finality_median_milliseconds", now.finality.median_ms, "Median finality of late."),
            ("finality_p99_milliseconds", now.finality.p99_ms, "99th percentile of finality of late."),
            ("head_timestamp_seconds", now.timestamp_ms / 1_000, "Timestamp of the newest final ledger block."),
        ):
            yield GaugeMetricFamily(f"countersign_{name}", meaning, value=value)
        yield from self._by_label(now)
        yield CounterMetricFamily("countersign_votes", "Votes sent.", value=now.votes_sent)
        for prefix, counted in sorted(self._counters.items()):
            for counter in fields(counted):
                value = _number(getattr(counted, counter.name))
                yield CounterMetricFamily(f"countersign_{prefix}_{counter.name}", "Since the start.", value=value)

    def _by_label(self, now: NodeStatus) -> Iterable[Metric]:
        connected = GaugeMetricFamily(
            "countersign_role_connected", "Voting members of a role that this node hears, and itself.", labels=["role"]
        )
        threshold = GaugeMetricFamily(
            "countersign_role_threshold", "How many of a role must vote for anything to be final.", labels=["role"]
        )
        for reach in now.roles:
            connected.add_metric([reach.role.value], reach.connected)
            threshold.add_metric([reach.role.value], reach.threshold)
        clocks = GaugeMetricFamily(
            "countersign_clock_ahead_seconds",
            "How far a leader's newest timestamp was ahead of this node's clock on arrival.",
            labels=["leader"],
        )
        for leader, ahead_ms in now.clocks_ahead_ms:
            clocks.add_metric([leader], ahead_ms / 1_000)
        return connected, threshold, clocks


def _number(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"a counter of {type(value).__name__}, expected int")
    return value
