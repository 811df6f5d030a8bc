"""Random kills of a PPO run's processes, each compared with the undisturbed run.

    python -m benchmarks.chaos --kills 30 --json chaos.json [--seed 0] [--per-run 9] [--engine hf]
        [--kinds policy controller samples values raise "reward task" disk node]

A kill counts as recovered if the run went on, and only with a witness: a failure record of the
right kind, pool and rank; for a task that scores rows none, as it is run again. After each kill
the weights and moments of the first step committed are held against the undisturbed run's, bit for
bit, and at the end of the run all steps, all metrics and the rows drawn; at the very end nothing
may be left behind. `disk` kills a rank while the run's directory, a small file system of its own, is
full. `node` ends a node of a Ray cluster of two with all its processes and its memory, and adds
another one; the run goes on there, from the newest checkpoint on disk or from its start. A kind
that this machine can't run is said. Leaves out the death of the head node; vLLM's engine is part of
the host process, which `samples` kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.chaos.full_disk import may_mount, mount, unmount
from benchmarks.chaos.kills import KINDS, Kill, carry_out, draw
from benchmarks.chaos.machines import Machines, machines
from benchmarks.chaos.marks import DIRECTORY
from benchmarks.chaos.runs import RunFiles, equal_runs, make_inputs, rows_of, start_run
from benchmarks.chaos.runs import temporary_directory as temporary
from hybridflow.snapshots.memory import MemoryPlace

STEPS_PER_KILL = 2
RECOVERY_S = 240.0
STEP_S = 240.0
RUN_S = 900.0
GONE_S = 30.0
"""How long the processes of a cluster may take to end after it was shut down."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one kill."""

    target: str
    rank: int
    signal: str
    phase: str
    step: int
    """The last step committed before it."""
    witnessed: bool
    recovered: bool
    weights_equal: bool
    """Of every step of its run."""
    detected_by: str
    detect_s: float | None
    """From the signal to the record of the failure; None without one."""
    total_s: float
    """From the signal to the next commit."""
    quiesce_s: float | None
    """Parts of total_s, where pools were restarted: until the other pools' calls had ended, ..."""
    rebuild_s: float | None
    """... until the pool stood again, ..."""
    restore_s: float | None
    """... until its roles held the commit. The rest is detection and the step that is replayed."""
    lost_steps: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-run", type=int, default=9, help="kills in one run")
    parser.add_argument("--engine", default="hf", help="generation engine: hf or vllm")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--directory", type=Path, help="where the runs are left to be looked at")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the run under way ends with it
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="chaos-"))
    result = disturb(directory, arguments)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    summary = {name: value for name, value in result.items() if name != "rows"}
    print(json.dumps(summary))
    if arguments.directory is None:
        shutil.rmtree(directory)
    whole = summary["recovered"] == summary["weights_equal"] == summary["kills"]
    left = summary["processes_left"] or summary["files_left"]
    sys.exit(0 if whole and not left else 1)


def disturb(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as mounted:
        return disturb_all(directory, arguments, mounted)


def possible(kinds: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The kinds that can be carried out here, and why the others can't."""
    reasons = {}
    if "disk" in kinds and not may_mount():
        reasons["disk"] = "this user may not mount a small file system"
    return [kind for kind in kinds if kind not in reasons], reasons


def disturb_all(
    directory: Path, arguments: argparse.Namespace, mounted: ExitStack
) -> dict[str, Any]:
    started = time.monotonic()
    kinds, reasons = possible(arguments.kinds)
    for kind, reason in reasons.items():
        print(f"kind {kind} is not run: {reason}", flush=True)
    if not kinds:
        raise ValueError("--kinds: none of them can be carried out on this machine")
    model, data = make_inputs(directory)
    per_run = min(arguments.per_run, arguments.kills)
    num_steps = STEPS_PER_KILL * per_run + 2
    undisturbed = RunFiles(directory=directory / "undisturbed")
    process = start_run(undisturbed.directory, model, data, num_steps, arguments.engine)
    if disturb_one(undisturbed, process, [], undisturbed)[1]:
        raise RuntimeError(f"the undisturbed run failed: {undisturbed.log.read_text()[-2000:]}")
    generator = random.Random(arguments.seed)
    kills = [draw(generator, number, kinds) for number in range(arguments.kills)]
    rows: list[Row] = []
    runs = [undisturbed]
    lost = doubled = 0
    for number, of_run in enumerate(grouped(kills, per_run)):
        run = RunFiles(directory=directory / f"disturbed-{number}")
        runs.append(run)
        if "disk" in kinds:
            mount(run.directory)
            mounted.callback(unmount, run.directory, arguments.directory is not None)
        with ExitStack() as on_nodes:
            nodes: Machines | None = None
            more: tuple[str, ...] = ()
            if of_run[0].target == "node":
                nodes = on_nodes.enter_context(machines(run.directory))
                more = nodes.settings
            process = start_run(run.directory, model, data, num_steps, arguments.engine, more)
            part, status = disturb_one(run, process, of_run, undisturbed, nodes)
        differences = [f"status {status}"] if status else equal_runs(undisturbed, run)
        rows += [replace(row, weights_equal=not differences) for row in part]
        if status == 0:
            missing = rows_of(undisturbed, num_steps) - rows_of(run, num_steps)
            lost, doubled = lost + max(0, missing), doubled + max(0, -missing)
        print(f"run {number}: {differences or 'equal'}", *part, sep="\n  ", flush=True)
    deadline = time.monotonic() + GONE_S
    while processes(directory) and time.monotonic() < deadline:
        time.sleep(1.0)
    return {
        "kills": arguments.kills,
        "recovered": sum(row.recovered and row.witnessed for row in rows),
        "prompts_lost": lost,
        "prompts_doubled": doubled,
        "weights_equal": sum(row.weights_equal for row in rows),
        "processes_left": len(processes(directory)),
        "files_left": sorted(chain.from_iterable(map(left_files, runs))) + drafts(directory),
        "not_run": reasons,
        "seed": arguments.seed,
        "seconds": time.monotonic() - started,
        "rows": [asdict(row) for row in rows],
    }


def grouped(kills: Sequence[Kill], per_run: int) -> list[list[Kill]]:
    """The kills of each run; those of a node are in runs of their own, on several nodes."""
    of_nodes = [kill for kill in kills if kill.target == "node"]
    others = [kill for kill in kills if kill.target != "node"]
    groups = []
    for part in (others, of_nodes):
        groups += [part[first : first + per_run] for first in range(0, len(part), per_run)]
    return groups


def disturb_one(
    run: RunFiles,
    process: subprocess.Popen[bytes],
    kills: list[Kill],
    undisturbed: RunFiles,
    nodes: Machines | None = None,
) -> tuple[list[Row], int]:
    """The rows of one run's kills, and its exit status."""
    rows: list[Row] = []
    median_s = undisturbed.median_s()
    try:
        for number, kill in enumerate(kills):
            commits = 1 + number * STEPS_PER_KILL
            if not wait_for(process, lambda commits=commits: run.last_step() >= commits, STEP_S):
                break
            rows.append(one_kill(run, process, kill, median_s, nodes))
            if not rows[-1].recovered:
                break
        status = process.wait(RUN_S)
    except subprocess.TimeoutExpired:
        status = -1
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(100)
    return rows, status


def one_kill(
    run: RunFiles,
    process: subprocess.Popen[bytes],
    kill: Kill,
    median_s: dict[str, float],
    nodes: Machines | None,
) -> Row:
    num_failures, num_recovered = len(run.events("failure")), num_recoveries(run)
    killed_at = carry_out(kill, run, median_s, nodes)
    step = run.last_step()
    if not kill.kind:  # nothing is restarted
        num_recovered -= 1
    recovered = wait_for(
        process,
        lambda: num_recoveries(run) > num_recovered and run.last_step() > step,
        RECOVERY_S,
    )
    total_s = time.time() - killed_at
    failures = [
        failure for failure in run.events("failure")[num_failures:] if kill.matches(failure)
    ]
    witnessed = len(failures) == 1
    if not kill.kind:
        witnessed = len(run.events("failure")) == num_failures
    if nodes is not None:  # on the new node
        (*_, last) = run.events("recovered") or [{"pids": {"policy": [0]}}]
        witnessed = bool(failures) and nodes.holds(last["pids"]["policy"])
    lost_steps, parts = 1, dict[str, float]()
    if not kill.kind:
        lost_steps = 0
    elif kill.target != "controller":
        for event in run.events("recovered")[-1:]:
            lost_steps, parts = event["lost_steps"], event
    return Row(
        target=kill.target,
        rank=kill.rank,
        signal=kill.how.name,
        phase=kill.phase,
        step=step,
        witnessed=witnessed,
        recovered=recovered,
        weights_equal=False,
        detected_by=kill.kind if failures else "",
        detect_s=failures[0]["time_s"] - killed_at if failures else None,
        total_s=total_s,
        quiesce_s=parts.get("quiesce_s"),
        rebuild_s=parts.get("rebuild_s"),
        restore_s=parts.get("restore_s"),
        lost_steps=lost_steps,
    )


def num_recoveries(run: RunFiles) -> int:
    """Recoveries in place, and starts of a controller."""
    return len(run.events("recovered")) + len(run.events("started"))


def wait_for(process: subprocess.Popen[bytes], condition: Any, seconds: float) -> bool:
    """Whether the condition came true while the run lived."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            return bool(condition())
        time.sleep(0.05)
    return True


def processes(directory: Path) -> set[int]:
    """Processes of the runs in `directory`, those of Ray included."""
    mark, pids = f"{DIRECTORY}={directory}".encode(), set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):  # gone meanwhile
                if mark in (entry / "environ").read_bytes():
                    pids.add(int(entry.name))
    return pids


def left_files(run: RunFiles) -> list[str]:
    """What the run's hosts, controllers and supervisors keep outside of its directory while they
    live."""
    files = list(temporary(run.directory).glob("hybridflow-s*"))
    memory = MemoryPlace.of(run.directory)
    if memory is not None and memory.directory.exists():
        files.append(memory.directory)
    return list(map(str, files))


def drafts(directory: Path) -> list[str]:
    """Files in the runs' directories that were begun and not finished."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob(".*")
        if path.name.startswith((".saving-", ".adding-", ".deleting-"))
    )


if __name__ == "__main__":
    main()
