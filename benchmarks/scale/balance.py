"""Groups by length against a fixed group of cp ranks: simulated seconds of a mini-batch.

python -m benchmarks.scale.balance [--json FILE]

The division is the engine's own (workers/engines/shared/group_sizes.py); seconds are the mapper's
model of H100 nodes of 8 for a 7B decoder: products, attention, the exchange of heads, and fixed costs
of a layer. Lengths follow published distributions (DISTRIBUTIONS). Nothing is measured. `fixed`
shares every micro-batch among all ranks of the group, `by length` among as few as hold it;
`imbalance` is the busiest rank's work over the mean.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from hybridflow.mapping.question.calibration import Calibration
from hybridflow.mapping.question.cluster import DEVICE_KINDS
from hybridflow.mapping.question.layouts import ModelLayout
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.zoo import MODELS
from hybridflow.mapping.simulate.compute import elementwise_s, products_s
from hybridflow.mapping.simulate.fabric import Fabric
from hybridflow.mapping.simulate.passes import exchanged_per_token
from workers.engines.shared.group_sizes import Assignment, assign_groups, imbalance
from workers.engines.shared.rows_together import pack, units

KIND, MODEL, SPACE, CALIBRATION = (
    DEVICE_KINDS["H100-80GB"],
    MODELS["qwen2.5-7b"],
    SearchSpace(),
    Calibration(),
)
RANKS, ROWS_OF_RANK, BUDGET = (8, 16), 8, 8192
"""Ranks of a row group (in one node, over two), rows of a mini-batch over ranks, tokens of a rank."""
DRAWS = 20


@dataclass(frozen=True, slots=True)
class Tail:
    """Lognormal lengths that are cut at `longest`, which is their 99.9th percentile.

    The spread is that of the responses to LMSYS-Chat-1M, whose 99.9th percentile is more than ten
    times the median (RLHFuse, arXiv 2409.13221, section 1).
    """

    longest: int

    def draw(self, generator: np.random.Generator, num_rows: int) -> np.ndarray:
        sigma = np.log(TAIL_RATIO) / NORMAL_999
        lengths = generator.lognormal(np.log(self.longest / TAIL_RATIO), sigma, num_rows)
        return np.clip(lengths, SHORTEST, self.longest).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Even:
    """All lengths between two are equally likely."""

    shortest: int
    longest: int

    def draw(self, generator: np.random.Generator, num_rows: int) -> np.ndarray:
        return generator.integers(self.shortest, self.longest + 1, num_rows)


TAIL_RATIO, NORMAL_999, SHORTEST = 10.0, 3.090, 64
"""The 99.9th percentile over the median, and that of a normal distribution; tokens of a prompt."""
DISTRIBUTIONS: dict[str, Tail | Even] = {
    "tail up to 40960": Tail(40960),
    "tail up to 65536": Tail(65536),
    "tail up to 98304": Tail(98304),
    "even, 8192 to 65536": Even(8192, 65536),
}
"""The longest responses are the limits of three production runs (Seer, arXiv 2511.14617: Qwen2-VL-72B,
Moonlight, Kimi K2); the last are the long instructions of LongAlign (arXiv 2401.18058, 8k to 64k
tokens)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for ranks, name in product(RANKS, DISTRIBUTIONS):
        row = compare(ranks, name)
        rows.append(row)
        print(
            " | ".join(
                f"{value:.3g}" if isinstance(value, float) else value for value in row.values()
            )
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


def compare(ranks: int, name: str) -> dict[str, str | float]:
    """Means over some mini-batches."""
    distribution, num_rows = DISTRIBUTIONS[name], ROWS_OF_RANK * ranks
    generator, near = np.random.default_rng(0), np.arange(num_rows)
    quadratic = 1 / (12 * MODEL.hidden_size)
    fixed, by_length, busiest = [], [], []
    for _ in range(DRAWS):
        widths = distribution.draw(generator, num_rows)

        def cut(
            rows: np.ndarray, budget_tokens: int, widths: np.ndarray = widths
        ) -> list[np.ndarray]:
            return [rows[part] for part in pack(widths[rows], budget_tokens)]

        whole = [Assignment(part, ranks, 0) for part in cut(near, ranks * BUDGET)]
        sized = assign_groups(widths, units(num_rows, None), near, BUDGET, ranks, cut, quadratic)
        fixed.append(seconds(whole, widths, ranks))
        by_length.append(seconds(sized, widths, ranks))
        busiest.append(imbalance(sized, widths, quadratic))
    return {
        "ranks": str(ranks),
        "lengths": name,
        "fixed_s": float(np.mean(fixed)),
        "by_length_s": float(np.mean(by_length)),
        "faster": float(np.mean(fixed) / np.mean(by_length)),
        "imbalance": float(np.mean(busiest)),
    }


def seconds(assignments: list[Assignment], widths: np.ndarray, ranks: int) -> float:
    """Forward and backward pass of the busiest rank."""
    busy = np.zeros(ranks)
    for assignment in assignments:
        first = assignment.place * assignment.size
        busy[first : first + assignment.size] += pass_seconds(
            widths[assignment.rows], assignment.size
        )
    return float(busy.max())


def pass_seconds(widths: np.ndarray, size: int) -> float:
    """One micro-batch on each of the `size` ranks that share it."""
    tokens = widths.sum() / size
    attended = float((widths.astype(float) ** 2).sum() / (2 * widths.sum()))
    layer = products_s(MODEL, KIND, CALIBRATION, SPACE, tokens=tokens, attended=attended, t=1)
    layer += elementwise_s(MODEL, KIND, CALIBRATION, SPACE, tokens=tokens, t=1)
    layer += CALIBRATION.layer_overhead_s
    exchange = 0.0
    if size > 1:
        received = SPACE.activation_bytes * tokens * exchanged_per_token(MODEL, ModelLayout(c=size))
        fabric = Fabric(KIND, CALIBRATION, max(size, KIND.devices_per_node))
        exchange = 2 * fabric.exchange(received, size, 1)
    directions = 1 + CALIBRATION.backward_factor
    return MODEL.num_layers * (directions * layer + exchange)


if __name__ == "__main__":
    main()
