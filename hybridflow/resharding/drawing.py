"""A plan as a picture: one panel per rank, and the bytes from every rank to every other.

In a panel x runs over the parameters (widths are bytes), y over the dim along which a parameter is
cut. Parameters that the two sides cut along different dims (FSDP cuts rows, tensor parallelism
columns) share one region at the right, their rows along x. The part of its generation shard that a
rank holds already has the rank's colour, the part that it receives the colour of the sender; white
parts are not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hybridflow.resharding.boxes import Ints
from hybridflow.resharding.plan import ReshardingPlan
from hybridflow.resharding.shard_map import ShardMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT, WIDTH = 48, 240
"""Raster of a panel."""
MOST_RANKS = 32


def draw_plan(plan: ReshardingPlan, path: Path, title: str) -> None:
    """Writes the picture (.png, .svg or .pdf); raises a ValueError for more than MOST_RANKS
    ranks."""
    if plan.num_ranks > MOST_RANKS:
        raise ValueError(
            f"picture: {plan.num_ranks} ranks do not fit on a page; draw a layout of at most "
            f"{MOST_RANKS}"
        )
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
    senders = _raster(plan, plan.receiver, plan.parameter, plan.start, plan.shape, plan.sender)
    source = plan.source
    trained = _raster(plan, source.rank, source.parameter, source.start, source.shape, source.rank)
    for rank, axis in enumerate(axes.flat):
        if rank >= plan.num_ranks:
            axis.set_axis_off()
            continue
        _panel(axis, senders[rank], trained[rank] >= 0, colours)
        axis.set_title(
            f"rank {rank}: receives {received[rank] / plan.target.num_bytes:.3g} M", fontsize=9
        )
    panels.supxlabel(
        "parameters, first layer to last; outlined: what the rank trains; number and colour: "
        "where it comes from",
        fontsize=9,
    )
    panels.supylabel("tensor dim", fontsize=9)
    _matrix(matrix.subplots(), plan)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(
    axis: Axes, senders: NDArray[np.int64], trained: NDArray[np.bool_], colours: NDArray[np.float64]
) -> None:
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


def _matrix(axis: Axes, plan: ReshardingPlan) -> None:
    remote = plan.remote
    total = np.zeros((plan.num_ranks, plan.num_ranks))
    np.add.at(total, (plan.sender[remote], plan.receiver[remote]), plan.num_bytes[remote])
    total /= plan.target.num_bytes
    axis.imshow(
        np.where(total > 0, total, np.nan),
        cmap="Blues",
        vmin=0,
        vmax=max(float(total.max()) * 1.6, 1e-12),
    )
    if plan.num_ranks <= 16:
        for sender, receiver in zip(*np.nonzero(total > 0.0005), strict=True):
            axis.text(
                receiver,
                sender,
                f"{total[sender, receiver]:.2g}",
                ha="center",
                va="center",
                fontsize=7,
            )
    axis.set(xlabel="to rank", ylabel="from rank", title="bytes sent, in units of M")
    axis.set_xticks(range(plan.num_ranks))
    axis.set_yticks(range(plan.num_ranks))


def _raster(
    plan: ReshardingPlan, rank: Ints, parameter: Ints, start: Ints, shape: Ints, value: Ints
) -> NDArray[np.int64]:
    """[ranks, HEIGHT, WIDTH]: `value` where a box of the rank covers the cell, else -1."""
    result = np.full((plan.num_ranks, HEIGHT, WIDTH), -1, dtype=np.int64)
    places = _places(plan)
    low, high = start.tolist(), (start + shape).tolist()
    for row, number in enumerate(parameter.tolist()):
        y_dim, x_dim, left, right = places[number]
        full = plan.target.parameters[number].shape or (1,)
        top = round(low[row][y_dim] / full[y_dim] * HEIGHT)
        bottom = round(high[row][y_dim] / full[y_dim] * HEIGHT)
        if x_dim is not None:
            per_element = (right - left) / full[x_dim]
            left, right = (
                left + low[row][x_dim] * per_element,
                left + high[row][x_dim] * per_element,
            )
        result[rank[row], top:bottom, round(left) : round(right)] = value[row]
    return result


def _places(plan: ReshardingPlan) -> list[tuple[int, int | None, float, float]]:
    """(dim along y, dim along x, left edge, right edge in the raster) of every parameter.

    Parameters that both sides cut along one dim lie side by side. Those that the two sides cut
    along different dims share one region at the right, where x is the dim that the source cuts.
    """
    cuts, both = [], []
    for number in range(len(plan.target.parameters)):
        have, need = _cut_dim(plan.source, number), _cut_dim(plan.target, number)
        cuts.append((have, need))
        both.append(have is not None and need is not None and have != need)
    sizes = np.array([spec.num_bytes for spec in plan.target.parameters], dtype=np.float64)
    along = np.where(both, 0, sizes)
    edges = np.concatenate([[0.0], np.cumsum(along)]) / sizes.sum() * WIDTH
    result: list[tuple[int, int | None, float, float]] = []
    for number, (have, need) in enumerate(cuts):
        if both[number]:
            result.append((need or 0, have, float(edges[-1]), float(WIDTH)))
        else:
            y_dim = need if need is not None else have
            result.append((y_dim or 0, None, float(edges[number]), float(edges[number + 1])))
    return result


def _cut_dim(shard_map: ShardMap, number: int) -> int | None:
    """The first dim that the boxes of a parameter are cut along; None where every box is the
    whole."""
    rows = shard_map.rows(number)
    for dim, size in enumerate(shard_map.parameters[number].shape):
        if (shard_map.shape[rows, dim] < size).any():
            return dim
    return None


def _colours(number: int) -> NDArray[np.float64]:
    """Light, well separated colours: float [number, 3]."""
    from colorsys import hls_to_rgb

    colours = []
    for index in range(number):
        colours.append(hls_to_rgb((index * 0.618034) % 1.0, 0.78 - 0.1 * (index % 2), 0.7))
    return np.array(colours)
