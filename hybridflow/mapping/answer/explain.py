"""Explain: a mapping and its rivals as text that a person reads; computes nothing that predict does not
give."""

from __future__ import annotations

from collections.abc import Sequence

from hybridflow.mapping.answer.auto import mapping_of
from hybridflow.mapping.answer.device_mapping import CallPlan, DeviceMapping
from hybridflow.mapping.search.search import PlacementResult, SearchResult
from hybridflow.mapping.search.setting import Setting

GB = 1e9


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; numbers to the right."""
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    right = [all(_is_number(row[column]) for row in rows) for column in range(len(headers))]
    lines = []
    for row in (headers, ["-" * width for width in widths], *rows):
        cells = (
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def mapping_report(mapping: DeviceMapping) -> str:
    """Pools and layouts, then every call with its seconds, where they go, and the memory while it runs."""
    head = (
        f"{mapping.algorithm} on {mapping.cluster}: {mapping.step_s:.3g} s a step, "
        f"{mapping.tokens_per_s:,.0f} tokens/s, "
        f"{idle_share(mapping):.0%} of the devices' time idle"
    )
    roles = [
        (
            plan.role,
            plan.pool,
            str(mapping.pool(plan.pool).num_devices),
            str(plan.layout or "-"),
            f"{plan.layout.micro_batch_tokens}" if plan.layout is not None else "-",
            str(plan.generation or "-"),
        )
        for plan in mapping.roles
    ]
    calls = [
        (
            call.call,
            call.pool,
            f"{call.start_s:.3g}",
            f"{call.seconds:.3g}",
            causes(call),
            *_memory(mapping, call),
        )
        for call in mapping.calls
    ]
    return "\n\n".join(
        (
            head,
            table(
                (
                    "role",
                    "pool",
                    "devices",
                    "layout p-t-d",
                    "micro-batch tokens",
                    "generation pg-tg x replicas",
                ),
                roles,
            ),
            table(
                (
                    "call",
                    "pool",
                    "starts s",
                    "takes s",
                    "where the time goes",
                    "GB",
                    "of GB",
                    "largest parts",
                ),
                calls,
            ),
        )
    )


def causes(call: CallPlan, count: int = 3) -> str:
    """The largest causes of a call's seconds, as shares."""
    ordered = sorted(call.causes_s.items(), key=lambda item: -item[1])[:count]
    return ", ".join(
        f"{name} {seconds / call.seconds:.0%}" for name, seconds in ordered if seconds >= 0.005 * call.seconds
    )


def rivals(setting: Setting, result: SearchResult) -> str:
    """One line per placement, best first: time, memory, and why it loses."""
    assert result.best is not None
    winner = mapping_of(setting, result.best)
    rows = [_rival_row(setting, winner, entry) for entry in result.placements]
    return table(("placement (devices)", "step s", "against best", "GB of GB", "idle", "why"), rows)


def reason(winner: DeviceMapping, loser: DeviceMapping) -> str:
    """The calls that take longer than in the winner, largest difference first, and what idling adds."""
    before = {call.call: call for call in winner.calls}
    slower = sorted(
        ((call.seconds - before[call.call].seconds, call) for call in loser.calls), key=lambda pair: -pair[0]
    )
    parts = []
    for extra, call in slower[:2]:
        if extra > 0.01 * winner.step_s:
            was = winner.pool_of(call.role).num_devices
            now = loser.pool_of(call.role).num_devices
            where = f"on {now} instead of {was} devices" if now != was else "with less memory left"
            parts.append(f"{call.call} +{extra:.3g} s {where}")
    if len(loser.pools) == 1 and len(winner.pools) > 1:
        parts.append("nothing overlaps: every call waits for the one before")
    more_idle = idle_share(loser) - idle_share(winner)
    if more_idle > 0.02:
        parts.append(f"{idle_share(loser):.0%} idle")
    return "; ".join(parts) or "each call nearly as fast, less overlap"


def idle_share(mapping: DeviceMapping) -> float:
    """Part of the planned devices' time in which no call runs."""
    busy = sum(call.seconds * mapping.pool(call.pool).num_devices for call in mapping.calls if call.bytes)
    return 1.0 - busy / (mapping.step_s * mapping.num_devices)


def _rival_row(setting: Setting, winner: DeviceMapping, entry: PlacementResult) -> tuple[str, ...]:
    name = " | ".join("+".join(roles) for roles in entry.placement)
    if entry.found is None:
        if entry.bound_s == float("inf"):
            return (name, "-", "-", "-", "-", "does not fit")
        return (name, f">={entry.bound_s:.4g}", "", "", "", "cannot be faster: even its bound loses")
    mapping = mapping_of(setting, entry.found)
    sized = " | ".join(f"{pool.name} {pool.num_devices}" for pool in mapping.pools)
    peaks = " ".join(
        f"{mapping.peak_bytes(pool.name) / GB:.0f}/{mapping.capacity_bytes[pool.name] / GB:.0f}"
        for pool in mapping.pools
    )
    why = "chosen" if mapping == winner else reason(winner, mapping)
    return (
        sized,
        f"{mapping.step_s:.4g}",
        f"{mapping.step_s / winner.step_s - 1:+.1%}",
        peaks,
        f"{idle_share(mapping):.0%}",
        why,
    )


def _memory(mapping: DeviceMapping, call: CallPlan) -> tuple[str, str, str]:
    if not call.bytes:
        return "-", "-", ""
    largest = sorted(call.bytes.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {value / GB:.3g}" for name, value in largest)
    return f"{call.total_bytes / GB:.3g}", f"{mapping.capacity_bytes[call.pool] / GB:.3g}", parts


def _is_number(text: str) -> bool:
    return text.strip(">=+-%.0123456789,eE") == ""
