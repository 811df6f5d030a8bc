"""The step as a picture: a row for each pool, a bar for each call. No other file of this
package needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hybridflow.dataflow import CallKind
from hybridflow.mapping.answer.device_mapping import CallPlan, DeviceMapping
from hybridflow.mapping.simulate.schedule import CONTROLLER

COLORS = {
    CallKind.generation: "#4477aa",
    CallKind.inference: "#88bbdd",
    CallKind.training: "#cc6633",
    CallKind.controller: "#999999",
}
TRANSITION_COLOR = "#223355"


def draw_timelines(mappings: dict[str, DeviceMapping], path: Path) -> None:
    """Draws a panel for every mapping (title -> mapping) over a common time axis, as a PNG or
    the format of the suffix."""
    rows = [max(1, len(_rows(mapping))) for mapping in mappings.values()]
    height = 0.9 + 0.62 * sum(rows) + 0.75 * len(rows)
    figure = Figure(figsize=(11, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(mappings), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    longest = max(mapping.step_s for mapping in mappings.values())
    for axis, (title, mapping) in zip(axes, mappings.items(), strict=True):
        names = _rows(mapping)
        for position, name in enumerate(names):
            for call in mapping.calls:
                if call.pool == name:
                    _bar(axis, position, call, longest)
        axis.set_yticks(range(len(names)), [_label(mapping, name) for name in names], fontsize=8)
        axis.set_ylim(len(names) - 0.45, -0.55)
        axis.set_xlim(0, longest * 1.01)
        axis.set_title(
            f"{title}: {mapping.step_s:.3g} s a step, {mapping.tokens_per_s:,.0f} tokens/s",
            fontsize=9,
            loc="left",
        )
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.axvline(mapping.step_s, color="#333333", linewidth=0.8, linestyle=":")
    axes[-1].set_xlabel("seconds of one step", fontsize=9)
    handles = []
    for kind, color in COLORS.items():
        if kind is not CallKind.controller:
            handles.append(Patch(color=color, label=kind.value))
    handles.append(Patch(color=TRANSITION_COLOR, label="transition"))
    figure.legend(handles=handles, loc="outside lower right", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path)


def _bar(axis, position: int, call: CallPlan, longest: float) -> None:  # type: ignore[no-untyped-def]
    """Draws a call; the transition into the generation layout is the dark beginning of its bar."""
    axis.barh(
        position,
        call.seconds,
        left=call.start_s,
        height=0.72,
        color=COLORS[CallKind(call.kind)],
        edgecolor="white",
        linewidth=0.8,
    )
    transition = call.causes_s.get("transition", 0.0)
    if transition:
        axis.barh(position, transition, left=call.start_s, height=0.72, color=TRANSITION_COLOR)
    method = call.call.split(".")[1]
    color = "black" if call.kind == CallKind.inference else "white"
    middle = call.start_s + (call.seconds + transition) / 2
    text = f"{call.role}\n{method}\n{call.seconds:.3g} s"
    if call.seconds - transition > longest * 0.0095 * max(map(len, text.split("\n"))):
        axis.text(middle, position, text, ha="center", va="center", fontsize=6.5, color=color)
    elif call.seconds - transition > longest * 0.02:
        axis.text(
            middle,
            position,
            call.role,
            ha="center",
            va="center",
            fontsize=6,
            rotation=90,
            color=color,
        )


def _rows(mapping: DeviceMapping) -> list[str]:
    return [pool.name for pool in mapping.pools if mapping.calls_in(pool.name)]


def _label(mapping: DeviceMapping, name: str) -> str:
    if name == CONTROLLER:
        return name
    pool = mapping.pool(name)
    peak, capacity = mapping.peak_bytes(name) / 1e9, mapping.capacity_bytes[name] / 1e9
    return (
        f"{name.replace('+', ' + ')}\n{pool.num_devices} x {pool.kind}, {peak:.0f} of "
        f"{capacity:.0f} GB"
    )
