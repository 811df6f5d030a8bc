"""Metrics of a run: one Tracker in front of console, JSONL, TensorBoard, Weights & Biases and Prometheus, and
plots of a run."""

from hybridflow.metrics.curves import Curve, draw_curves
from hybridflow.metrics.jsonl import read_jsonl
from hybridflow.metrics.tracker import MetricsConfig, Tracker, WandbMode

__all__ = ["Curve", "MetricsConfig", "Tracker", "WandbMode", "draw_curves", "read_jsonl"]
