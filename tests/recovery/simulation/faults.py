"""A seed's faults, and the search for the fewest of them that still break something."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class What(StrEnum):
    kill_rank = "kill_rank"
    hang_rank = "hang_rank"
    raise_in_rank = "raise_in_rank"
    lose_node = "lose_node"
    lose_node_for_good = "lose_node_for_good"
    kill_controller = "kill_controller"
    freeze_controller = "freeze_controller"
    second_controller = "second_controller"
    kill_at_file_operation = "kill_at_file_operation"
    power_cut = "power_cut"
    power_cut_at_file_operation = "power_cut_at_file_operation"
    drain = "drain"
    disk_full = "disk_full"
    slow_disk = "slow_disk"
    flip_in_memory = "flip_in_memory"
    flip_on_disk = "flip_on_disk"
    double_an_event = "double_an_event"
    not_finite = "not_finite"


@dataclass(frozen=True, slots=True)
class Fault:
    what: What
    at: float
    """Seconds of virtual time."""
    number: int
    """Which rank, node, file operation, event, or rows."""
    seconds: float
    """How long it lasts, or the notice's time."""

    def __str__(self) -> str:
        return f"{self.what} at {self.at:.2f} s (number {self.number}, {self.seconds:.1f} s)"


@dataclass(frozen=True, slots=True)
class Setup:
    """What a seed decides besides the faults."""

    num_steps: int
    colocated: bool
    flush_every: int
    flush_seconds: float
    snapshot_every: int
    max_restarts: int
    export_every: int
    exports: bool
    """Whether exports are files, which a full disk refuses."""
    faults: tuple[Fault, ...]


def draw(seed: int) -> Setup:
    chance = random.Random(seed)
    num_steps = chance.randint(2, 6)
    horizon = 6.0 + 7.0 * num_steps
    kinds = [what for what in What if what is not What.not_finite]
    faults = []
    for _ in range(chance.randint(1, 5)):
        fault = Fault(
            what=chance.choice(kinds),
            at=chance.uniform(0.0, 1.3 * horizon),
            number=chance.randrange(1, 120),
            seconds=chance.uniform(1.0, 30.0),
        )
        faults.append(fault)
        if chance.random() < 0.3:  # another one soon after it, during the recovery
            soon = Fault(
                what=chance.choice(kinds),
                at=fault.at + chance.uniform(0.0, 12.0),
                number=chance.randrange(1, 120),
                seconds=chance.uniform(1.0, 30.0),
            )
            faults.append(soon)
    further = random.Random(f"further {seed}")
    for _ in range(further.choice([0, 0, 1, 2])):
        fault = Fault(What.not_finite, 0.0, further.randrange(1, 120), 1.0)
        faults.append(fault)
    if further.random() < 0.3:  # the last export meets a full disk, and a recovery may too
        at = horizon - further.uniform(4.0, 15.0)
        faults.append(Fault(What.disk_full, at, 1, further.uniform(5.0, 60.0)))
        if further.random() < 0.5:
            soon = at + further.uniform(0.5, 6.0)
            faults.append(Fault(What.kill_rank, soon, further.randrange(1, 120), 1.0))
    return Setup(
        num_steps=num_steps,
        colocated=chance.random() < 0.25,
        flush_every=chance.choice([0, 1, 1, 2, 3]),
        flush_seconds=chance.choice([0.1, 0.1, 1.0, 4.0]),
        snapshot_every=chance.choice([1, 1, 1, 2, 0]),
        max_restarts=chance.choice([12, 12, 12, 12, 1]),
        export_every=further.choice([0, 0, 1, 2]),
        exports=True,
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
    )


def shrink(
    faults: Sequence[Fault], breaks: Callable[[tuple[Fault, ...]], bool]
) -> tuple[Fault, ...]:
    """The faults without those that are not needed to break it."""
    needed = tuple(faults)
    index = 0
    while index < len(needed):
        fewer = needed[:index] + needed[index + 1 :]
        if breaks(fewer):
            needed, index = fewer, 0
        else:
            index += 1
    return needed
