"""Explain: a mapping and its rivals as text for people; every number is one that predict gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hybridflow.mapping.answer.auto import mapping_of
from hybridflow.mapping.answer.device_mapping import CallPlan, DeviceMapping, RolePlan
from hybridflow.mapping.search.search import PlacementResult, SearchResult, search
from hybridflow.mapping.search.setting import Setting

GB = 1e9
ROLE_HEADERS = (
    "role",
    "pool",
    "devices",
    "layout p-t-d",
    "micro-batch tokens",
    "generation pg-tg x replicas",
)
CALL_HEADERS = (
    "call",
    "pool",
    "starts s",
    "takes s",
    "where the time goes",
    "GB",
    "of GB",
    "largest parts",
)
RIVAL_HEADERS = ("placement (devices)", "step s", "against best", "GB of GB", "idle", "why")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; columns of numbers are aligned to the right."""
    columns = []
    for header, *cells in zip(headers, *rows, strict=True):
        width = max(map(len, (header, *cells)))
        justify = str.rjust if all(map(_is_number, cells)) else str.ljust
        columns.append([justify(cell, width) for cell in (header, "-" * width, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def mapping_report(mapping: DeviceMapping) -> str:
    """Pools and layouts, then every call with its seconds, their causes, and the memory while
    it runs."""
    head = (
        f"{mapping.algorithm} on {mapping.cluster}: {mapping.step_s:.3g} s a step, "
        f"{mapping.tokens_per_s:,.0f} tokens/s, {idle_share(mapping):.0%} of the devices' time idle"
    )
    roles = [_role_row(mapping, plan) for plan in mapping.roles]
    calls = [_call_row(mapping, call) for call in mapping.calls]
    parts = [head, table(ROLE_HEADERS, roles), table(CALL_HEADERS, calls)]
    for pool, members in mapping.sharing.items():
        parts.append(f"pool {pool}: the frozen weights of {', '.join(members)} are in memory once")
    for pool, num_bytes in mapping.process_bytes.items():
        parts.append(f"a process of pool {pool}: {num_bytes / GB:.3g} GB at most")
    return "\n\n".join(parts)


def _role_row(mapping: DeviceMapping, plan: RolePlan) -> tuple[str, ...]:
    layout, tokens = "-", "-"
    if plan.layout is not None:
        layout, tokens = str(plan.layout), str(plan.layout.micro_batch_tokens)
    devices = str(mapping.pool(plan.pool).num_devices)
    return plan.role, plan.pool, devices, layout, tokens, str(plan.generation or "-")


def _call_row(mapping: DeviceMapping, call: CallPlan) -> tuple[str, ...]:
    times = f"{call.start_s:.3g}", f"{call.seconds:.3g}", causes(call)
    return call.call, call.pool, *times, *_memory(mapping, call)


def causes(call: CallPlan, count: int = 3) -> str:
    """The largest causes of a call's seconds, as shares."""
    parts = []
    for name, seconds in _largest(call.causes_s, count):
        share = seconds / call.seconds
        if share >= 0.005:
            parts.append(f"{name} {share:.0%}")
    return ", ".join(parts)


def rivals(setting: Setting, result: SearchResult) -> str:
    """A line for every placement, best first: time, memory, and why it loses."""
    assert result.best is not None
    winner = mapping_of(setting, result.best)
    return table(RIVAL_HEADERS, [_rival_row(setting, winner, entry) for entry in result.placements])


def context_gain(setting: Setting, result: SearchResult) -> str:
    """A line that says what context parallelism saves; empty where no layout of the best mapping
    has it. Searches once more, without it."""
    assert result.best is not None
    winner = mapping_of(setting, result.best)
    sizes = []
    for plan in winner.roles:
        if plan.layout is not None and plan.layout.c > 1:
            sizes.append(f"{plan.role} cp{plan.layout.c}")
    if not sizes:
        return ""
    space = replace(setting.space, context_sizes=(1,))
    without = search(replace(setting, space=space)).best
    if without is None:
        saved = "without it nothing fits"
    else:
        step_s = mapping_of(setting, without).step_s
        more = step_s / winner.step_s - 1
        saved = f"the best plan without it takes {step_s:.4g} s a step ({more:+.1%})"
    return f"context parallelism ({', '.join(sizes)}): {saved}"


def reason(winner: DeviceMapping, loser: DeviceMapping) -> str:
    """The calls that take longer than in the winner, largest difference first, and the idling
    that is added."""
    winner_s = {call.call: call.seconds for call in winner.calls}
    slower = sorted(loser.calls, key=lambda call: winner_s[call.call] - call.seconds)
    parts = []
    for call in slower[:2]:
        extra = call.seconds - winner_s[call.call]
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
    """The share of the planned devices' time in which no call runs."""
    busy = 0.0
    for call in mapping.calls:
        if call.bytes:
            busy += call.seconds * mapping.pool(call.pool).num_devices
    return 1.0 - busy / (mapping.step_s * mapping.num_devices)


def _rival_row(setting: Setting, winner: DeviceMapping, entry: PlacementResult) -> tuple[str, ...]:
    name = " | ".join(map("+".join, entry.placement))
    if entry.solution is None:
        if entry.bound_s == float("inf"):
            return (name, "-", "-", "-", "-", "does not fit")
        return (
            name,
            f">={entry.bound_s:.4g}",
            "",
            "",
            "",
            "cannot be faster: even its bound loses",
        )
    mapping = mapping_of(setting, entry.solution)
    sizes, peaks = [], []
    for pool in mapping.pools:
        sizes.append(f"{pool.name} {pool.num_devices}")
        peak, capacity = mapping.peak_bytes(pool.name), mapping.capacity_bytes[pool.name]
        peaks.append(f"{peak / GB:.0f}/{capacity / GB:.0f}")
    why = "chosen" if mapping == winner else reason(winner, mapping)
    return (
        " | ".join(sizes),
        f"{mapping.step_s:.4g}",
        f"{mapping.step_s / winner.step_s - 1:+.1%}",
        " ".join(peaks),
        f"{idle_share(mapping):.0%}",
        why,
    )


def _memory(mapping: DeviceMapping, call: CallPlan) -> tuple[str, str, str]:
    if not call.bytes:
        return "-", "-", ""
    total, capacity = call.total_bytes / GB, mapping.capacity_bytes[call.pool] / GB
    parts = [f"{name} {value / GB:.3g}" for name, value in _largest(call.bytes, 3)]
    return f"{total:.3g}", f"{capacity:.3g}", ", ".join(parts)


def _largest(parts: dict[str, float], count: int) -> list[tuple[str, float]]:
    """The `count` largest entries, largest first."""
    return sorted(parts.items(), key=lambda part: -part[1])[:count]


def _is_number(text: str) -> bool:
    return text.strip(">=+-%.0123456789,eE") == ""
