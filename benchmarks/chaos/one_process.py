"""Kills of runs in one process (runtime=local), at any of their operations on files and at any
moment, each run compared with the undisturbed one.

    python -m benchmarks.chaos.one_process --runs 20 [--cases dapo "drain remax"] [--seed 0]

Python and its libraries are loaded once; every life of a run is a fork of that. A life ends with
SIGKILL right before a drawn operation on a file of the run (its output directory or its memory: open
to write, rename, remove, ...), or at a drawn moment; the next one is the same command again or, every
other time, what a supervisor starts. Now and then a file of the newest snapshot is cut off between two
lives.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import hybridflow
import recipes.run  # noqa: F401
import workers.engines.fsdp.engine
import workers.generation.hf
import workers.weight_sync  # noqa: F401
from benchmarks.chaos.recipes import CASES, Case, case
from benchmarks.chaos.runs import CLOCKS, RunFiles, equal_runs
from controllers.saving import DISK, MEMORY, Saving, steps_of
from hybridflow.checkpoint import CheckpointStore
from hybridflow.recovery.actions import Exit
from hybridflow.recovery.attempts import newest
from hybridflow.snapshots.memory import MemoryPlace
from hybridflow.supervision import SUPERVISION
from hybridflow.supervisor import read_state, write_state
from recipes.notice import keep_what_memory_holds
from recipes.python_settings import make_settings

OPERATIONS = frozenset(
    ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate")
)
"""Python's audit events of what changes files."""
MOST_KILLS = 4
"""In one run."""
LIFE_S = 300.0
OF_EARLIER = re.compile(r"lost/|attempts/|events\.jsonl|trace.*\.json|log$|damaged-|error\.txt")
"""Files that tell of what happened to a run."""
CHECKPOINT = "checkpoints/step-"
"""Those before the last one depend on the notices that a run got."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How a life ended."""

    status: int
    """Negative: the signal."""
    seconds: float
    operations: int


class Life:
    """life = Life(case, output)
    end = life.run(kill_at=120)             # killed right before its operation on a file number 120
    """

    def __init__(self, of: Case, output: Path) -> None:
        self.case, self.output = of, output
        self.control = output.with_name(f"{output.name}.control")
        self.counted = output.with_name(f"{output.name}.operations")
        self.log = output.with_name(f"{output.name}.log")
        self._settings = of.settings | {"runtime": "local", "output_dir": output}
        self.has_successor = False
        """Whether the supervisor of the last life starts the next one."""

    def run(
        self,
        *,
        kill_at: int = 0,
        kill_after_s: float = 0.0,
        supervised: bool = False,
        how: signal.Signals = signal.SIGKILL,
    ) -> End:
        """`kill_at`, `kill_after_s`: 0 for none."""
        started = time.monotonic()
        if supervised:
            self.control.mkdir(exist_ok=True)
            known = read_state(self.control) if self.has_successor else {}
            write_state(self.control, known | {"again": True})
        self.has_successor = supervised
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            self._live(kill_at, how, parent if supervised else 0)
        deadline = started + (kill_after_s or LIFE_S)
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(pid, how if kill_after_s else signal.SIGABRT)
                deadline = time.monotonic() + LIFE_S
            time.sleep(0.003)
        operations = int(self.counted.read_text() or 0) if self.counted.exists() else 0
        return End(
            status=os.waitstatus_to_exitcode(status),
            seconds=time.monotonic() - started,
            operations=operations,
        )

    def _live(self, kill_at: int, how: signal.Signals, supervisor: int) -> None:
        """In the child: never returns."""
        os.setsid()
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        status = 1
        try:
            torch.set_num_threads(1)
            if supervisor:
                settings = make_settings(self.case.recipe, self._settings)
                SUPERVISION.on_leave = partial(keep_what_memory_holds, settings)
                SUPERVISION.join(self.control, supervisor)
            logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
            self._count(kill_at, how)
            hybridflow.run(self.case.recipe, self._settings)
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException as error:
            logging.exception("the life ends: %s", error)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _count(self, kill_at: int, how: signal.Signals) -> None:
        """Counts this process' operations on the run's files; sends it the signal before number
        `kill_at`."""
        places = (str(self.output), f"/dev/shm/hybridflow-{os.getuid()}/{self.output.name}-")
        number = 0
        counted = os.open(self.counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def look(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal number
            if event not in OPERATIONS or not arguments:
                return
            path = arguments[0]
            if not isinstance(path, str | Path) or not str(path).startswith(places):
                return
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            number += 1
            os.pwrite(counted, str(number).encode(), 0)
            if number == kill_at:
                os.write(2, f"KILLED before {number}: {event} {arguments[:2]}\n".encode())
                os.kill(os.getpid(), how)

        sys.addaudithook(look)


def disturb(
    of: Case, output: Path, calm: End, generator: random.Random, damages: bool
) -> tuple[int, list[str]]:
    """Runs it to its end; kills, and what was done in words."""
    life, told = Life(of, output), []
    kills = 0
    while True:
        kill_at, after_s = 0, 0.0
        if kills < MOST_KILLS:
            if generator.random() < 0.7:
                kill_at = generator.randint(1, calm.operations)
            else:
                after_s = generator.uniform(0.01, calm.seconds)
        supervised, how = generator.random() < 0.6, signal.SIGKILL
        if supervised and generator.random() < 0.4:
            how = signal.SIGTERM
        end = life.run(kill_at=kill_at, kill_after_s=after_s, supervised=supervised, how=how)
        told.append(
            f"{'supervised' if supervised else 'again'} {how.name} at {kill_at or f'{after_s:.2f} s'}: "
            f"status {end.status} after {end.operations} operations, {end.seconds:.1f} s"
        )
        if end.status == Exit.preempted:
            kills += 1
            told += leave_machine(output, was_damaged=any("safetensors" in line for line in told))
            life.has_successor = False  # another job begins
            continue
        if end.status not in (-signal.SIGKILL, -signal.SIGTERM):
            if end.status:
                told.append(f"FAILED: {life.log.read_text()[-1500:]}")
            return kills, told
        kills += 1
        if damages and generator.random() < 0.4:
            told.append(damage(output, generator))


def leave_machine(output: Path, *, was_damaged: bool) -> list[str]:
    """What memory held is lost after a notice; in words, where no checkpoint has it and nobody damaged
    it."""
    memory = MemoryPlace.of(output)
    if memory is None:
        return []
    commits = Saving({}, CheckpointStore(output / "checkpoints"), memory).timeline()
    on_disk = steps_of(commits, DISK)
    lost = [f"FAILED: step {step} is lost" for step in steps_of(commits, MEMORY)[-1:]]
    shutil.rmtree(memory.directory, ignore_errors=True)
    is_whole = was_damaged or set(steps_of(commits, MEMORY)[-1:]) <= set(on_disk)
    return ["memory is lost"] if is_whole else lost


def damage(output: Path, generator: random.Random) -> str:
    """Cuts off, removes or flips a byte of a file of the newest commit in memory, where there is one
    before it."""
    commits = MemoryPlace.commits_of(output)
    if len(commits) < 2:
        return "nothing to damage"
    path = generator.choice(sorted(commits[0].path.glob("*/*.safetensors")))
    how = generator.choice(("truncated", "removed", "flipped"))
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, generator.randrange(path.stat().st_size))
    else:
        with path.open("r+b") as file:
            file.seek(generator.randrange(path.stat().st_size))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 16]))
    return f"{how} {path}"


def differences(undisturbed: Path, disturbed: Path, of: Case) -> list[str]:
    one, other = RunFiles(directory=undisturbed), RunFiles(directory=disturbed)
    if not of.is_exact:
        lines = [
            {step: line["rows"] for step, line in run.ledger().items()} for run in (one, other)
        ]
        found = [] if lines[0] == lines[1] else ["rows"]
        steps = [[(row["step"], row["split"]) for row in run.metrics()] for run in (one, other)]
        return found + ([] if steps[0] == steps[1] else ["steps of metrics.jsonl"])
    found = equal_runs(one, other)
    samples = [without_clocks(run / "samples.jsonl") for run in (undisturbed, disturbed)]
    if samples[0] != samples[1]:
        found.append("samples")
    return found


def without_clocks(path: Path) -> list[Any]:
    """The lines of a file without what a clock decides, in turns of an episode too."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {name: part for name, part in value.items() if not CLOCKS.search(name)}
            return {name: timeless(part) for name, part in kept.items()}
        return [timeless(part) for part in value] if isinstance(value, list) else value

    lines = path.read_text().splitlines() if path.exists() else []
    return [timeless(json.loads(line)) for line in lines]


def left(undisturbed: Path, disturbed: Path) -> list[str]:
    """Files that the undisturbed run does not have, and those that it has alone; memory."""
    names = []
    for run in (undisturbed, disturbed):
        found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
        last = f"checkpoints/{(run / 'checkpoints' / 'latest').read_text().strip()}/"
        kept = [name for name in found if not OF_EARLIER.search(name)]
        names.append({name for name in kept if not name.startswith(CHECKPOINT) or last in name})
    words = [f"also has {name}" for name in sorted(names[1] - names[0])]
    words += [f"lacks {name}" for name in sorted(names[0] - names[1])]
    place = MemoryPlace.of(disturbed)
    if place is not None and place.directory.exists():
        words.append(f"memory {place.directory}")
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1, help="disturbed runs of each case")
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-damage", action="store_true")
    parser.add_argument("--directory", type=Path, help="where the runs are left to be looked at")
    arguments = parser.parse_args()
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="kills-"))
    kills = runs = equal = 0
    for name in arguments.cases:
        at = directory / name.replace(" ", "-")
        of = case(name, at)
        undisturbed = at / "undisturbed"
        calm = Life(of, undisturbed).run()
        if calm.status:
            raise RuntimeError(f"{name}: {Life(of, undisturbed).log.read_text()[-3000:]}")
        print(f"{name}: {calm.operations} operations, {calm.seconds:.1f} s", flush=True)
        for number in range(arguments.runs):
            generator = random.Random(f"{arguments.seed} {name} {number}")
            disturbed = at / f"disturbed-{number}"
            count, told = disturb(of, disturbed, calm, generator, not arguments.no_damage)
            failed = [line for line in told if "FAILED" in line]
            found = failed or differences(undisturbed, disturbed, of) + left(undisturbed, disturbed)
            kills, runs, equal = kills + count, runs + 1, equal + (not found)
            attempts = newest(disturbed / "attempts")
            print(f"  {number}: {count} kills, {attempts} attempts: {found or 'equal'}", flush=True)
            if found:
                print(*(f"    {line}" for line in told), sep="\n", flush=True)
            elif arguments.directory is None:
                shutil.rmtree(disturbed)
    print(json.dumps({"kills": kills, "runs": runs, "equal": equal, "seed": arguments.seed}))
    if arguments.directory is None and equal == runs:
        shutil.rmtree(directory)
    sys.exit(0 if equal == runs else 1)


if __name__ == "__main__":
    main()
