"""Metrics and samples of a run: one Tracker in front of console, JSONL, TensorBoard, Weights &
Biases and Prometheus, and plots of a run."""

from hybridflow.metrics.curves import Curve, draw_curves
from hybridflow.metrics.jsonl import read_jsonl, read_samples
from hybridflow.metrics.samples import Sample, SamplesConfig
from hybridflow.metrics.tracker import MetricsConfig, Tracker, WandbMode

__all__ = [
    "Curve",
    "MetricsConfig",
    "Sample",
    "SamplesConfig",
    "Tracker",
    "WandbMode",
    "draw_curves",
    "read_jsonl",
    "read_samples",
]
