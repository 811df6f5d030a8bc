"""simulate(seed) -> Outcome: a run, its faults, its supervisor, and the rules that must hold.

the weights at the end, and at every restore, are those of the undisturbed run
the ledger holds every row once, in order
no sample is drawn with other weights than those of the step before
a commit on disk can be read at any time after the first one
a controller never restarts more often without progress than it may
with a few faults the run ends, and it is done unless a reason is there not to be
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from hybridflow.checkpoint import CheckpointStore, load_metadata
from hybridflow.recovery import events as on
from hybridflow.recovery.actions import Exit
from hybridflow.recovery.budget import Budget, after_exit
from hybridflow.recovery.events import Place
from hybridflow.recovery.state import Policy
from tests.recovery.simulation.bugs import Bugs
from tests.recovery.simulation.calls import RUN, Watch
from tests.recovery.simulation.cluster import (
    COLOCATED,
    NARROW,
    ROWS_PER_STEP,
    WIDE,
    Cluster,
    Killed,
    PowerCut,
    Process,
    Truth,
    Weights,
    digest,
    undisturbed,
)
from tests.recovery.simulation.commits import EXPORT
from tests.recovery.simulation.controller import Controller
from tests.recovery.simulation.crash_files import SimulatedPath
from tests.recovery.simulation.faults import Fault, Setup, What, draw, shrink

LIMIT_S = 5000.0
STALE_S = 15.0
"""A frozen controller is killed after this."""
DISK_GRACE_S = 120.0
SOUND = Bugs()


@dataclass(frozen=True, slots=True)
class Outcome:
    seed: int
    faults: tuple[Fault, ...]
    broken: tuple[str, ...]
    """The rules that did not hold; empty is good."""
    status: int | None
    attempts: int
    restores: tuple[tuple[int, Place], ...]
    seconds: float

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {'; '.join(self.broken) or 'every rule holds'}"]
        lines += [f"    {fault}" for fault in self.faults]
        return "\n".join(lines)


@cache
def truth(num_steps: int, given_up: frozenset[int]) -> Truth:
    return undisturbed(num_steps, given_up)


class Run:
    def __init__(self, seed: int, setup: Setup, bugs: Bugs) -> None:
        self.seed, self.setup, self.bugs = seed, setup, bugs
        self.cluster = Cluster(seed)
        self.policy = Policy(
            max_restarts=setup.max_restarts,
            snapshot_every=setup.snapshot_every,
            flush_every=setup.flush_every,
            export_every=setup.export_every if setup.exports else 0,
            disk_grace_s=DISK_GRACE_S,
            deterministic=True,
        )
        self.budget = Budget(max_restarts=setup.max_restarts)
        positions = set()
        for fault in setup.faults:
            if fault.what is What.not_finite:
                positions.add(fault.number % setup.num_steps * ROWS_PER_STEP)
        self.not_finite = frozenset(positions)
        self.truth = truth(setup.num_steps, self.not_finite)
        self.watch = Watch(restores=[], broken=[])
        self.attempt = 0
        self.controller: Controller
        self.process: Process
        self.running: list[tuple[Controller, Process]] = []
        self.status: int | None = None
        self.reason = ""
        self.slow_until = 0.0
        self.happened: set[What] = set()
        files = self.cluster.files
        files.sync_directories = not bugs.no_rename_sync
        files.sync_files = not bugs.no_file_sync
        files.before_operation = self.before_operation
        self.kills: dict[int, What] = {}

    def expected(self, step: int) -> Mapping[str, Weights]:
        return self.truth.weights[max(step, 0)]

    def flush_seconds(self) -> float:
        return 8.0 if self.cluster.now < self.slow_until else self.setup.flush_seconds

    def before_operation(self, number: int) -> None:
        what = self.kills.pop(number, None)
        if what is What.kill_at_file_operation:
            raise Killed
        if what is What.power_cut_at_file_operation:
            raise PowerCut

    def start(self) -> None:
        self.attempt += 1
        layout = WIDE
        num_up = sum(node.up for node in self.cluster.nodes)
        if self.setup.colocated:
            layout = COLOCATED
        if num_up < 2:
            layout = NARROW
        if self.attempt > 1:
            self.check_durable()
        watch = self.watch
        watch.restarts, watch.furthest = 0, -1
        doubled = set()
        for fault in self.setup.faults:
            if fault.what is What.double_an_event:
                doubled.add(fault.number)
        controller = Controller(
            self.cluster,
            attempt=self.attempt,
            layout=layout,
            policy=self.policy,
            num_steps=self.setup.num_steps,
            bugs=self.bugs,
            watch=watch,
            expected=self.expected,
            flush_seconds=self.flush_seconds,
            doubled=frozenset(doubled),
            not_finite=self.not_finite,
            exports=self.setup.exports,
        )
        self.controller = controller
        self.process = self.cluster.spawn(
            controller.run(), self.attempt, lambda: self.ended(controller)
        )

    def ended(self, controller: Controller) -> None:
        """The supervisor's part."""
        self.cluster.kill_attempt(controller.attempt)
        if controller is not self.controller:
            return  # a controller that was thought to be dead
        status = -9 if controller.status is None else controller.status
        self.budget, refusal = after_exit(self.budget, status, furthest=self.watch.furthest)
        requeued = status in (Exit.preempted, Exit.other_layout)
        if requeued or not refusal:
            self.cluster.after(3.0, self.start)  # the scheduler, or the supervisor
            return
        self.status = status
        self.reason = f"{controller.reason}; {refusal}"

    # Faults.

    def inject(self, fault: Fault) -> None:
        cluster, what = self.cluster, fault.what
        self.happened.add(what)
        ranks = cluster.ranks
        match what:
            case What.kill_rank | What.hang_rank | What.raise_in_rank if ranks:
                trouble = {"kill_rank": "died", "hang_rank": "hung", "raise_in_rank": "raised"}
                ranks[fault.number % len(ranks)].trouble = trouble[what]
            case What.lose_node:
                cluster.lose_node(cluster.nodes[fault.number % 3], fault.seconds)
            case What.lose_node_for_good if sum(node.up for node in cluster.nodes) > 1:
                cluster.lose_node(cluster.nodes[fault.number % 3], None)
            case What.kill_controller if self.process.alive:
                self.kill(self.process)
            case What.freeze_controller if self.process.alive:
                process = self.process
                process.frozen_until = cluster.now + fault.seconds

                def stale() -> None:
                    if process.alive and process.frozen_until > cluster.now:
                        self.kill(process)

                cluster.after(STALE_S, stale)
            case What.second_controller if self.process.alive:
                self.start()
            case What.power_cut if self.status is None:
                cluster.power_cut()
            case What.drain if self.process.alive:
                process = self.process
                self.controller.inbox.append(on.Draining(deadline=cluster.now + fault.seconds))

                def end() -> None:
                    if process.alive:
                        self.controller.status = int(Exit.preempted)
                        self.kill(process)

                cluster.after(fault.seconds + 0.5, end)
            case What.disk_full:
                cluster.files.full = True
                cluster.after(fault.seconds, self.free_disk)
            case What.slow_disk:
                self.slow_until = cluster.now + fault.seconds
            case What.flip_in_memory:
                files = []
                for node in cluster.nodes:
                    files += list(node.memory.values())
                if files:
                    files[fault.number % len(files)].damaged = True
            case What.flip_on_disk:
                self.flip(fault.number)

    def free_disk(self) -> None:
        self.cluster.files.full = False

    def kill(self, process: Process) -> None:
        process.alive = False
        if process in self.cluster.processes:
            self.cluster.processes.remove(process)
        process.ended()

    def flip(self, number: int) -> None:
        paths = list((SimulatedPath(self.cluster.files, RUN) / "checkpoints").rglob("*.json"))
        if not paths:
            return
        file = paths[number % len(paths)].file()
        data = bytearray(file.data)
        data[number % len(data)] ^= 1
        file.data = file.synced = bytes(data)

    # Rules.

    def readable_steps(self) -> list[int]:
        files: Any = self.cluster.files
        directory: Any = SimulatedPath(self.cluster.files, RUN) / "checkpoints"
        steps = []
        for checkpoint in CheckpointStore(directory, disk=files).all():
            try:
                load_metadata(checkpoint.path, disk=files)
            except ValueError:
                continue  # damaged, or still being removed
            steps.append(checkpoint.step)
        return steps

    def check_durable(self) -> None:
        promised = self.watch.durable and What.flip_on_disk not in self.happened
        if promised and not self.readable_steps():
            self.watch.broken.append("no commit on disk can be read any more")

    def check_end(self) -> None:
        broken = self.watch.broken
        if self.status is None:
            broken.append(f"did not end within {LIMIT_S:.0f} s")
            return
        if self.status != Exit.done:
            if not self.may_give_up():
                broken.append(f"gave up ({self.status}): {self.reason}")
            return
        self.check_durable()
        last = self.setup.num_steps
        if last not in self.readable_steps() and What.flip_on_disk not in self.happened:
            broken.append("the last step is not on disk")
        elif self.setup.exports and self.exported(last) != digest_of_actor(
            self.truth.weights[last]
        ):
            broken.append("the last step's commit is without its model")
        lines = (SimulatedPath(self.cluster.files, RUN) / "ledger").read_text().split("\n")[:-1]
        if tuple(lines) != self.truth.ledger:
            steps = [line.split(" ")[0] for line in lines]
            broken.append(f"the ledger differs from the undisturbed run's: steps {steps}")

    def exported(self, step: int) -> str:
        """The model in the step's commit; empty where it has none."""
        directories = SimulatedPath(self.cluster.files, RUN) / "checkpoints"
        for directory in directories.glob(f"step-{step:08d}*"):
            path = directory / EXPORT / "model"
            if path.is_file():
                return path.read_text()
        return ""

    def may_give_up(self) -> bool:
        if "restarts without a new step" in self.reason:
            spent = self.watch.restarts >= self.setup.max_restarts
            return spent or self.budget.restarts >= self.setup.max_restarts
        flipped = {What.flip_on_disk, What.flip_in_memory} & self.happened
        return "can be restored" in self.reason and bool(flipped)


def digest_of_actor(weights: Mapping[str, Weights]) -> str:
    """What an export of these weights holds."""
    return f"{digest({'actor': weights['actor']}):016x}"


def simulate(
    seed: int,
    *,
    bugs: Bugs = SOUND,
    faults: tuple[Fault, ...] | None = None,
    exports: bool = True,
) -> Outcome:
    """`faults` in place of the seed's; without `exports` a run has that many file operations less."""
    setup = replace(draw(seed), exports=exports)
    if faults is not None:
        setup = replace(setup, faults=faults)
    run = Run(seed, setup, bugs)
    run.start()
    for fault in setup.faults:
        if fault.what is What.not_finite:
            continue
        if fault.what in (What.kill_at_file_operation, What.power_cut_at_file_operation):
            run.kills[fault.number] = fault.what
            run.happened.add(fault.what)
            continue
        run.cluster.after(fault.at, lambda fault=fault: run.inject(fault))  # type: ignore[misc]
    run.cluster.run_until(lambda: run.status is not None, LIMIT_S)
    run.check_end()
    return Outcome(
        seed=seed,
        faults=setup.faults,
        broken=tuple(dict.fromkeys(run.watch.broken)),
        status=run.status,
        attempts=run.attempt,
        restores=tuple(run.watch.restores),
        seconds=run.cluster.now,
    )


def shrunk(outcome: Outcome, bugs: Bugs = SOUND) -> Outcome:
    """The same seed with as few of its faults as still break a rule."""
    faults = shrink(
        outcome.faults,
        lambda fewer: bool(simulate(outcome.seed, bugs=bugs, faults=fewer).broken),
    )
    return simulate(outcome.seed, bugs=bugs, faults=faults)
