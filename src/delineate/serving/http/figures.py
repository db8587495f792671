"""The front door's figures, as Prometheus has them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from delineate.serving.protocol import Figures

_FIGURES: dict[str, tuple[type[GaugeMetricFamily] | type[CounterMetricFamily], str, str, str]] = {
    "jobs": (GaugeMetricFamily, "delineate_jobs", "Jobs that are not over.", "state"),
    "workers": (GaugeMetricFamily, "delineate_workers", "Workers that are connected.", ""),
    "connections": (GaugeMetricFamily, "delineate_connections", "Clients and workers that are connected.", ""),
    "spool bytes": (GaugeMetricFamily, "delineate_spool_bytes", "Scans and results on the disk.", ""),
    "disk used": (GaugeMetricFamily, "delineate_disk_used_ratio", "The disk that is used, by anything.", ""),
    "disk limit": (GaugeMetricFamily, "delineate_disk_limit_ratio", "Scans are refused beyond it.", ""),
    "received bytes": (CounterMetricFamily, "delineate_received_bytes", "Bytes of scans received.", ""),
    "sent bytes": (CounterMetricFamily, "delineate_sent_bytes", "Bytes of results sent.", ""),
    "refused": (CounterMetricFamily, "delineate_refused", "Messages answered by an error.", "code"),
    "dropped": (CounterMetricFamily, "delineate_dropped", "Connections closed by the front door.", "reason"),
    "": (CounterMetricFamily, "delineate_events", "What else has happened, mostly to jobs.", "event"),
}
"""Figures of the front door, by name or by the word that they begin with: kind, name, meaning, label."""


class FrontDoorFigures(Collector):
    """What the front door counts, as Prometheus has it."""

    def __init__(self, known: Figures | None) -> None:
        self._known = known

    def collect(self) -> Iterator[Metric]:
        known = self._known
        yield GaugeMetricFamily("delineate_up", "Whether the front door answers.", value=known is not None)
        if known is None:
            return
        yield GaugeMetricFamily("delineate_ready", "Whether a scan that comes now is segmented.", value=known.ready)
        yield GaugeMetricFamily("delineate_models", "Models on offer.", value=len(known.models))
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        stages: dict[str, dict[str, float]] = {}
        for name, value in known.figures.items():
            word, _, which = name.replace(": ", " ", 1).partition(" ")
            if word == "stage":
                stage, _, bound = which.rpartition(" ")
                stages.setdefault(stage, {})[bound] = value
                continue
            if name in _FIGURES:
                word, which = name, ""
            elif word not in _FIGURES:
                word, which = "", name
            kind, metric, about, label = _FIGURES[word]
            if metric not in families:
                families[metric] = kind(metric, about, labels=[label] if label else [])
            families[metric].add_metric([which] if label else [], value)
        yield from families.values()
        took = HistogramMetricFamily("delineate_stage_seconds", "Seconds that a stage of a job took.", labels=["stage"])
        for stage, counts in stages.items():
            total = counts.pop("sum", 0.0)
            buckets = [("+Inf" if bound == "inf" else bound, count) for bound, count in counts.items()]
            took.add_metric([stage], sorted(buckets, key=lambda one: float(one[0])), total)
        yield took
