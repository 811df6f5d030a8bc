"""Who sends what to whom, as a picture: one panel per rank, and the bytes from every rank to every other.

In a panel x runs over the parameters (widths are bytes), y over the dim along which a parameter is cut. What the rank already
holds of its generation shard is in its own colour, what it receives in the colour of the sender, what it does not need is white.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hybridflow.resharding.boxes import Ints
from hybridflow.resharding.plan import Plan
from hybridflow.resharding.shard_map import ShardMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT, WIDTH = 48, 240
"""Raster of a panel."""
MOST_RANKS = 32


def draw(plan: Plan, path: Path, title: str) -> None:
    """Write the picture (.png, .svg, .pdf). ValueError for more ranks than a page holds."""
    if plan.num_ranks > MOST_RANKS:
        raise ValueError(f"picture: {plan.num_ranks} ranks do not fit on a page; draw a layout of at most {MOST_RANKS}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 4 if plan.num_ranks > 2 else plan.num_ranks
    rows = -(-plan.num_ranks // columns)
    colours = _colours(plan.num_ranks)
    figure = pyplot.figure(figsize=(3.1 * columns + 4.6, 1.75 * rows + 1.1), layout="constrained")
    panels, matrix = np.asarray(figure.subfigures(1, 2, width_ratios=[3.1 * columns, 4.6])).tolist()
    figure.suptitle(title)
    received = plan.bytes_received
    axes = panels.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    cells = _cells(plan)
    held = _raster(plan.source, plan.source.rank, plan.source.parameter, plan.source.start, plan.source.shape, plan)
    for rank, axis in enumerate(axes.flat):
        if rank >= plan.num_ranks:
            axis.set_axis_off()
            continue
        _panel(axis, cells[rank], held[rank] >= 0, colours)
        axis.set_title(f"rank {rank}: receives {received[rank] / plan.target.num_bytes:.3g} M", fontsize=9)
    panels.supxlabel("parameters, first layer to last; outlined: what the rank trains; number and colour: where it comes from", fontsize=9)
    panels.supylabel("tensor dim", fontsize=9)
    _matrix(matrix.subplots(), plan)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis: Axes, senders: NDArray[np.int64], trained: NDArray[np.bool_], colours: NDArray[np.float64]) -> None:
    image = np.ones((HEIGHT, WIDTH, 3))
    image[senders >= 0] = colours[senders[senders >= 0]]
    axis.imshow(image, aspect="auto", origin="upper", extent=(0, 1, 1, 0), interpolation="nearest")
    if trained.any() and not trained.all():
        padded = np.pad(trained, 1).astype(float)
        x = (np.arange(WIDTH + 2) - 0.5) / WIDTH
        y = (np.arange(HEIGHT + 2) - 0.5) / HEIGHT
        axis.contour(x, y, padded, levels=[0.5], colors="black", linewidths=1.2)
    axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    for sender in np.unique(senders[senders >= 0]):
        row, column = np.nonzero(senders == sender)
        if len(row) > 0.02 * HEIGHT * WIDTH:
            centre = float(np.median(column) + 0.5) / WIDTH, float(np.median(row) + 0.5) / HEIGHT
            axis.text(*centre, str(sender), ha="center", va="center", fontsize=9)


def _matrix(axis: Axes, plan: Plan) -> None:
    remote = plan.remote
    total = np.zeros((plan.num_ranks, plan.num_ranks))
    np.add.at(total, (plan.sender[remote], plan.receiver[remote]), plan.num_bytes[remote])
    total /= plan.target.num_bytes
    axis.imshow(np.where(total > 0, total, np.nan), cmap="Blues", vmin=0, vmax=max(float(total.max()) * 1.6, 1e-12))
    if plan.num_ranks <= 16:
        for sender, receiver in zip(*np.nonzero(total), strict=True):
            axis.text(receiver, sender, f"{total[sender, receiver]:.2g}", ha="center", va="center", fontsize=7)
    axis.set(xlabel="to rank", ylabel="from rank", title="bytes sent, in units of M")
    axis.set_xticks(range(plan.num_ranks))
    axis.set_yticks(range(plan.num_ranks))


def _cells(plan: Plan) -> NDArray[np.int64]:
    """For every rank and raster cell the rank that the contents come from (itself if held), -1 where not needed."""
    return _raster(plan.target, plan.receiver, plan.parameter, plan.start, plan.shape, plan, plan.sender)


def _raster(
    shard_map: ShardMap, rank: Ints, parameter: Ints, start: Ints, shape: Ints, plan: Plan, value: Ints | None = None
) -> NDArray[np.int64]:
    """[ranks, HEIGHT, WIDTH]: `value` (default: the rank) where a box covers the cell, else -1."""
    result = np.full((plan.num_ranks, HEIGHT, WIDTH), -1, dtype=np.int64)
    sizes = np.array([spec.num_bytes for spec in plan.target.parameters], dtype=np.float64)
    edges = np.concatenate([[0.0], np.cumsum(sizes)]) / sizes.sum() * WIDTH
    dims = _cut_dims(plan)
    for row in range(len(rank)):
        number = int(parameter[row])
        dim, whole = dims[number], plan.target.parameters[number].shape
        full = whole[dim] if whole else 1
        low, high = round(float(edges[number])), round(float(edges[number + 1]))
        top = round(int(start[row, dim]) / full * HEIGHT)
        bottom = round(int(start[row, dim] + shape[row, dim]) / full * HEIGHT)
        result[int(rank[row]), top:bottom, low:high] = int(rank[row]) if value is None else int(value[row])
    return result


def _cut_dims(plan: Plan) -> list[int]:
    """The dim of every parameter that its target boxes are cut along; where they are whole, that of its source boxes; else 0."""
    result = []
    for number, spec in enumerate(plan.target.parameters):
        dim = 0
        for shard_map in (plan.source, plan.target):
            rows = shard_map.rows(number)
            cut = [i for i in range(len(spec.shape)) if (shard_map.shape[rows, i] < spec.shape[i]).any()]
            dim = cut[0] if cut else dim
        result.append(dim)
    return result


def _colours(number: int) -> NDArray[np.float64]:
    """Light, well separated colours: float [number, 3]."""
    from colorsys import hls_to_rgb

    return np.array([hls_to_rgb((i * 0.618034) % 1.0, 0.78 - 0.1 * (i % 2), 0.7) for i in range(number)])
