"""Measurements: the times of a short run on this machine; plain data between recipes.calibrate and
fit.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybridflow.mapping.question.model import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSample:
    """A forward pass, or forward, backward and optimizer update, of a device, or of several data
    ranks.

    PassSample(model=tiny, rows=32, prompt=8, response=64, micro_batches=1, training=False, seconds=0.21)
    """

    model: ModelSpec
    rows: int
    prompt: int
    """Tokens of every row that are not scored."""
    response: int
    """Scored tokens of every row."""
    micro_batches: int
    training: bool
    seconds: float
    ranks: int = 1
    """Data ranks that share the rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSample:
    """A generation call of a device: `rows` prompts of equal length, responses of equal length, all
    running at once."""

    model: ModelSpec
    rows: int
    prompt: int
    response: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveSample:
    """An all-gather, where every rank ends with `num_bytes`; or a reduce-scatter, where every
    rank begins with them."""

    num_bytes: float
    ranks: int
    seconds: float
    reduces: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncSample:
    """New weights into the generation engine of a device: copied, attested, repacked, probed."""

    model: ModelSpec
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurements:
    """Measurements.load(path). Everything was measured while `num_processes` processes did the
    same at the same time."""

    name: str
    num_processes: int
    memory_bytes: float
    """Bytes of a process' share of the machine's memory."""
    compute_bytes: float
    """Bytes of a number in the compute precision: 4 for float32, 2 for bf16."""
    matmul_flops: float
    """Per second, in large products."""
    memory_bandwidth: float
    """Bytes read and written per second, in large copies."""
    passes: tuple[PassSample, ...] = ()
    generations: tuple[GenerationSample, ...] = ()
    collectives: tuple[CollectiveSample, ...] = ()
    syncs: tuple[SyncSample, ...] = ()
    call_s: float = 0.0
    """Seconds of a call from the controller to a pool and back that does nothing."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Measurements:
        content: dict[str, Any] = json.loads(path.read_text())
        samples = {
            "passes": _samples(PassSample, content["passes"]),
            "generations": _samples(GenerationSample, content["generations"]),
            "collectives": _samples(CollectiveSample, content["collectives"]),
            "syncs": _samples(SyncSample, content.get("syncs", ())),
        }
        return cls(**{**content, **samples})


def _samples(kind: type, entries: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    """The samples of a kind as `asdict` wrote them."""
    samples = []
    for entry in entries:
        if "model" in entry:
            entry = {**entry, "model": ModelSpec(**entry["model"])}
        samples.append(kind(**entry))
    return tuple(samples)
