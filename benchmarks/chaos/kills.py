"""One disturbance: which process, with which signal, at which moment; and its witness."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos.full_disk import full
from benchmarks.chaos.machines import Machines
from benchmarks.chaos.marks import MARKS, RAISE, REWARD_TASK
from benchmarks.chaos.runs import RunFiles

PHASES = {
    "policy": (
        "actor.update_actor",
        "actor.sync_weights",
        "reference.compute_ref_log_prob",
        "actor.stage_snapshot",
    ),
    "values": (
        "critic.compute_values",
        "critic.update_critic",
        "reward.compute_reward",
        "critic.stage_snapshot",
    ),
    "samples": ("generation.generate_sequences", "generation.sync_weights"),
}
"""Calls of each pool during which a process is killed, under the names that Ray gives the process
meanwhile."""
WATCHED = ("policy", "values", "samples")
POLL_S = 0.003
FULL_S = 90.0
"""How long a full disk stays full after the kill where the run does not recover from it."""
PATIENCE_S = 60.0
"""How long a phase is waited for; then the process is killed wherever it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """Kill(target="policy", rank=1, how=signal.SIGKILL, phase="actor.update_actor",
    fraction=0.3)"""

    target: str
    """A pool, "controller", "reward task", "raise": a rank's method that raises, "disk": rank of the
    policy while the run's disk is full, or "node": the policy's node, which another one replaces."""
    rank: int
    how: signal.Signals
    phase: str
    fraction: float
    """The part of the phase's median duration that passes before the signal."""

    @property
    def kind(self) -> str:
        """That of the failure that must be reported; empty for a task whose death is nobody's
        failure."""
        if self.target == "reward task":
            return ""
        if self.target == "raise":
            return "raised"
        return "hung" if self.how is signal.SIGSTOP else "died"

    def matches(self, failure: Mapping[str, object]) -> bool:
        """Whether a record of events.jsonl is of this kill."""
        if failure["kind"] != self.kind:
            return False
        if self.target == "controller":
            return failure["role"] == "controller"
        if self.target == "node":  # all ranks of the pool die at once
            return failure["pool"] == self.pool
        return failure["pool"] == self.pool and failure["rank"] == self.rank

    @property
    def pool(self) -> str:
        """Where the process is."""
        return "policy" if self.target in ("raise", "disk", "node") else self.target


TURNS = (
    ("policy", 0),
    ("controller", 0),
    ("samples", 0),
    ("policy", 1),
    ("values", 0),
    ("raise", 1),
    ("reward task", 0),
    ("disk", 0),
    ("node", 0),
)
"""(target, rank) of the kills, in turn."""
KINDS = tuple(dict.fromkeys(target for target, _ in TURNS))


def draw(generator: random.Random, number: int, kinds: Collection[str] = KINDS) -> Kill:
    """The kill with that number: targets in turn, signals and moments at random."""
    turns = [turn for turn in TURNS if turn[0] in kinds]
    target, rank = turns[number % len(turns)]
    if target in ("raise", "reward task"):
        phases = {"raise": "actor.update_actor", "reward task": "reward.compute_reward"}
        return Kill(
            target=target, rank=rank, how=signal.SIGKILL, phase=phases[target], fraction=0.0
        )
    if target in ("disk", "node"):
        phase = generator.choice(PHASES["policy"])
        return Kill(target=target, rank=rank, how=signal.SIGKILL, phase=phase, fraction=0.5)
    signals = [signal.SIGKILL] * 4 + [signal.SIGSEGV, signal.SIGABRT]
    if target != "controller":
        signals.append(signal.SIGSTOP)
    pool = target if target in PHASES else generator.choice(WATCHED)
    return Kill(
        target=target,
        rank=rank,
        how=generator.choice(signals),
        phase=generator.choice(PHASES[pool]),
        fraction=generator.random(),
    )


def carry_out(
    kill: Kill, run: RunFiles, median_s: Mapping[str, float], nodes: Machines | None = None
) -> float:
    """Waits for the moment and sends the signal; returns when that was (Unix seconds). Raises a
    RuntimeError where the process is not there. `nodes`: those of the run, for kills of one."""
    if kill.target in ("raise", "reward task"):
        return leave_mark(run.directory, kill)
    if kill.target == "disk":
        with full(run.directory):
            num_recovered = run.recoveries_in_log()
            killed_at = send_signal(kill, run, median_s)
            while run.recoveries_in_log() == num_recovered and time.time() - killed_at < FULL_S:
                time.sleep(POLL_S)
        return killed_at
    if kill.target == "node":
        assert nodes is not None, "only runs on several nodes can lose one"
        wait_for_moment(kill, run, median_s)
        killed_at = time.time()
        nodes.lose_one()
        nodes.replace()
        return killed_at
    return send_signal(kill, run, median_s)


def send_signal(kill: Kill, run: RunFiles, median_s: Mapping[str, float]) -> float:
    """Sends it at its moment; returns when that was."""
    os.kill(wait_for_moment(kill, run, median_s), kill.how)
    return time.time()


def wait_for_moment(kill: Kill, run: RunFiles, median_s: Mapping[str, float]) -> int:
    """Returns at the moment of the kill, with the process that it is about."""
    watched, victim = _processes(kill, run)
    started = _start_time(victim)
    deadline = time.monotonic() + PATIENCE_S
    while _title(watched) != f"ray::{kill.phase}" and time.monotonic() < deadline:
        if started is None or _start_time(victim) != started:
            raise RuntimeError(f"{kill}: pid {victim} is not there")
        time.sleep(POLL_S)
    time.sleep(kill.fraction * median_s.get(kill.phase, 0.0))
    if started is None or _start_time(victim) != started:
        raise RuntimeError(f"{kill}: pid {victim} is not there")
    return victim


def leave_mark(directory: Path, kill: Kill) -> float:
    """Leaves the mark that the run's own code looks for, and waits until it was taken; returns when
    that was."""
    name = REWARD_TASK if kill.target == "reward task" else f"{RAISE}{kill.rank}"
    mark = directory / MARKS / name
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    deadline = time.monotonic() + PATIENCE_S
    while mark.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{kill}: nobody took {mark}")
        time.sleep(POLL_S)
    return time.time()


def _processes(kill: Kill, run: RunFiles) -> tuple[int, int]:
    """The process whose title tells the phase, and the one to kill, from the run's own records."""
    records = [event for event in run.events() if "pids" in event]
    pids = records[-1]["pids"]
    controller = [event["pid"] for event in records if event["event"] == "started"][-1]
    if kill.target != "controller":
        return pids[kill.pool][kill.rank], pids[kill.pool][kill.rank]
    for pool, phases in PHASES.items():
        if kill.phase in phases:
            return pids[pool][0], controller
    raise ValueError(f"phase {kill.phase} is of no pool")


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ").decode()
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Tells a process from a later one with the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
