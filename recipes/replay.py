"""python -m recipes.replay RUN --step K [--directory DIR] [name=value ...]

Trains step K of a run again and says whether it leaves the same bits. RUN is the output_dir of a
run, finished, killed or under way; nothing in it is changed. The state before the step comes from
the newest commit at or before step K - 1, in memory or on disk, or from the weights that the run
began with; the steps between are trained again too. Every step is held against the line that the
run's ledger has of it: its rows, the position in the data, and a digest of every tensor of every
trained role.

Settings are those of RUN/config.yaml, and name=value changes them: runtime=local trains the step in
this process, under a debugger. Another layout or another kind of device rounds differently.

Status 0: the step is as recorded, bit for bit. 1: it differs; the first tensor that differs is named.
2: the step can't be replayed.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from controllers import QUESTIONS, algorithm_entry
from controllers.ledger import LEDGER, TENSOR_DIGITS, Line, line_difference, read_ledger
from controllers.loop import Loop
from controllers.not_finite import StepGivenUp
from controllers.saving import MEMORY, Commit, Saving, checkpoint_at
from hybridflow.checkpoint import CheckpointStore
from hybridflow.manifest import read_manifest
from hybridflow.metrics import MetricsConfig
from hybridflow.metrics.jsonl import METRICS, read_jsonl
from hybridflow.recovery.config import RecoveryConfig
from hybridflow.snapshots.memory import MemoryPlace
from hybridflow.waiting import catch_interrupts
from recipes.composing import to_settings
from recipes.config import RunConfig
from recipes.errors import plain_errors
from recipes.overrides import check_form, check_names
from recipes.preparation import prepare
from recipes.session import Session
from recipes.settings_history import CONFIG, settings_of_step

CLOCKS = re.compile(r"seconds|tokens_per_s|time_s|sync/.*_(s|bytes)$|memory")
"""Metrics that a clock or the machine decides."""
MOST_METRICS = 8
"""Metrics that are shown of a step that differs."""

LOGGER = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run")
    parser.add_argument("--step", type=int, required=True, metavar="K", help="1 or later")
    parser.add_argument(
        "--directory", type=Path, help="a new directory for what the replay logs (default: none)"
    )
    parser.add_argument("settings", nargs="*", metavar="name=value", help="changes of settings")
    parsed = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    catch_interrupts()
    with plain_errors():
        result = replay(parsed.run, parsed.step, parsed.settings, directory=parsed.directory)
        print(result)
        sys.exit(0 if result.is_equal else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """print(replay(Path("outputs/ppo"), 7))"""

    step: int
    """The first step that differs; the last one where none does."""
    source: str
    """In words: the state that the replay began from."""
    difference: str
    """Where the step differs, as Difference.what; empty where it is as recorded."""
    tensors: Mapping[str, tuple[int, int]]
    """By role: how many tensors differ, and of how many."""
    metrics: Mapping[str, tuple[object, object]]
    """The metrics that differ: as recorded, and now."""

    @property
    def is_equal(self) -> bool:
        return not self.difference

    def __str__(self) -> str:
        if self.is_equal:
            counts = [f"all {count} tensors of {name}" for name, (_, count) in self.tensors.items()]
            return (
                f"step {self.step} is as recorded, bit for bit: rows, position and "
                f"{', '.join(counts)}; replayed from {self.source}"
            )
        lines = [f"step {self.step} differs in {self.difference}; replayed from {self.source}"]
        for name, (differing, count) in self.tensors.items():
            lines.append(f"  {name}: {differing} of {count} tensors differ")
        for name in list(self.metrics)[:MOST_METRICS]:
            recorded, now = self.metrics[name]
            lines.append(f"  {name}: {recorded} | {now}")
        if len(self.metrics) > MOST_METRICS:
            lines.append(f"  and {len(self.metrics) - MOST_METRICS} further metrics")
        return "\n".join(lines)


def replay(
    run: Path, step: int, changes: Sequence[str] = (), *, directory: Path | None = None
) -> Replay:
    """Trains steps up to `step` again, until one differs from the run's ledger. A ValueError where
    that can't be done. `directory`: a new directory for the replay's own metrics and ledger, which
    hosts on other nodes must see too; by default one in `run`, which is removed."""
    recorded = recorded_lines(run, step)
    config, first = settings_of_run(run, changes, step)
    with scratch(run, directory) as output:
        metrics = MetricsConfig(console=False, tensorboard=False)
        every = max(1, config.recovery.snapshot_every)
        prepared = prepare(
            replace(
                config,
                output_dir=str(output),
                dry_run=False,
                graph=False,
                loop=replace(config.loop, resume="never"),
                recovery=RecoveryConfig(max_restarts=0, snapshot_every=every),
                metrics=metrics,
            )
        )
        with Session(prepared) as session:
            loop = session.loop
            try:
                source = begin(loop, run, config, recorded, step, output, first)
                return compared(loop, run, recorded, step, source)
            finally:
                loop.saving.clear()


def recorded_lines(run: Path, step: int) -> dict[int, Line]:
    """The run's ledger by step. A ValueError where it has no digests of `step`."""
    path = run / LEDGER
    if not path.is_file():
        raise ValueError(f"{run}: has no {LEDGER}, so it is no run's output_dir")
    lines = {line["step"]: line for line in read_ledger(path)}
    with_digests = [number for number, line in lines.items() if line["roles"] and number > 0]
    if not with_digests:
        raise ValueError(
            f"{path}: has no digests, because no step was staged in memory "
            "(recovery.snapshot_every=0, or /dev/shm is too small), so there is nothing to compare "
            "a replay with"
        )
    if step not in with_digests:
        raise ValueError(
            f"--step is {step}; {path} has digests of {len(with_digests)} steps from "
            f"{min(with_digests)} to {max(with_digests)}: choose one of these"
        )
    return lines


def settings_of_run(run: Path, changes: Sequence[str], step: int) -> tuple[RunConfig, int]:
    """The settings that the step was trained with, with these changes; and the step after which they
    hold, because a resume changed them there."""
    path, first = settings_of_step(run, step)
    if not path.is_file():
        raise ValueError(f"{run}: has no {CONFIG}, so its settings are not known")
    check_form(changes)
    check_names(changes)
    written = OmegaConf.load(path)
    name = str(OmegaConf.select(written, "algorithm.name"))
    if name in QUESTIONS:
        raise ValueError(f"{run}: {name} trains nothing, so there is no step to replay")
    schema = OmegaConf.structured(RunConfig(algorithm=algorithm_entry(name).load_config()()))
    try:
        merged = OmegaConf.merge(schema, written, OmegaConf.from_dotlist(list(changes)))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: {error.full_key}: {reason}") from error
    return to_settings(cast(DictConfig, merged)), first


@contextmanager
def scratch(run: Path, directory: Path | None) -> Iterator[Path]:
    """The output directory of the replay."""
    if directory is not None:
        if directory.exists() and any(directory.iterdir()):
            raise ValueError(f"--directory is {directory}, which is not empty; name a new one")
        yield directory
        return
    try:
        path = Path(tempfile.mkdtemp(prefix=".replay-", dir=run))
    except OSError as error:
        raise ValueError(f"{run}: can't be written to ({error}); add --directory DIR") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def begin(
    loop: Loop,
    run: Path,
    config: RunConfig,
    recorded: Mapping[int, Line],
    step: int,
    output: Path,
    first: int,
) -> str:
    """Brings the roles, data and algorithm to the newest state before `step` that can be read, and
    not before step `first`, until which the run had other settings; returns it in words."""
    for commit in commits_before(run, config.loop.resume, recorded, step):
        if commit.step < first:
            continue
        words = f"step {commit.step} ({commit.path}, {commit.place})"
        if commit.place == MEMORY:  # a run that is under way writes over it
            copy = output / "memory" / commit.path.name
            try:
                shutil.copytree(commit.path, copy)
            except (OSError, shutil.Error) as error:
                LOGGER.warning("step %d can't be copied: %s", commit.step, error)
                continue
            commit = replace(commit, path=copy)
        shutil.copy(run / LEDGER, loop.ledger.path)  # what is before the commit
        try:
            loop.begin_from(commit)
        except ValueError as error:
            LOGGER.warning("step %d can't be restored: %s", commit.step, error)
            continue
        return words
    if first:
        raise ValueError(
            f"--step is {step}; the run was resumed with other settings after step {first}, and no "
            f"commit from step {first} to {step - 1} is left to replay it from; choose a later step, "
            "or keep more checkpoints (loop.keep_last)"
        )
    loop.ledger.rewind(None)
    return "the weights that the run began with"


def commits_before(run: Path, resume: str, recorded: Mapping[int, Line], step: int) -> list[Commit]:
    """The commits of the recorded timeline before `step`, the latest first. `resume`: the run's
    loop.resume, which may name the checkpoint that it began from."""
    saving = Saving({}, CheckpointStore(run / "checkpoints"), MemoryPlace.of(run))
    if resume not in ("auto", "never"):
        saving.origin = checkpoint_at(Path(resume))
    commits = []
    for commit in saving.commits():
        state = commit.state if commit.place == MEMORY else read_manifest(commit.path)["metadata"]
        line = recorded.get(commit.step)
        same = line is not None and state.get("ledger", {}).get("chain") == line["chain"]
        if commit.step < step and same:
            commits.append(commit)
    return sorted(commits, key=lambda commit: (commit.step, commit.place == MEMORY), reverse=True)


def compared(loop: Loop, run: Path, recorded: Mapping[int, Line], step: int, source: str) -> Replay:
    """Trains up to `step`; ends at the first step that differs."""
    while True:
        if loop.step in recorded:
            line = loop.stage()
            loop.record()
            if not line["roles"]:
                raise ValueError(
                    "a replay needs room in /dev/shm for a snapshot, of which the digests are "
                    "taken (see the log); give it more (docker run --shm-size=...)"
                )
            difference = line_difference(recorded[loop.step], line, loop.ledger.names)
            has_digests = bool(recorded[loop.step]["roles"])
            if (difference and has_digests) or loop.step >= step:
                break
        train(loop)
    names = loop.ledger.names
    return Replay(
        step=loop.step,
        source=source,
        difference=difference,
        tensors=differing_tensors(recorded[loop.step], line, names),
        metrics={} if not difference else differing_metrics(run, loop),
    )


def train(loop: Loop) -> None:
    """The next step; one that on_nonfinite=rewind gives up is passed over as it was in the run."""
    try:
        loop.train_one_step()
    except StepGivenUp:
        loop.restore()


def differing_tensors(
    recorded: Line, line: Line, names: Mapping[str, Sequence[str]]
) -> dict[str, tuple[int, int]]:
    counts = {}
    for role, of_role in names.items():
        before, now = recorded["roles"].get(role), line["roles"].get(role)
        digests = "" if before is None else before["tensors"]
        differing = 0
        for number in range(len(of_role)):
            at = slice(number * TENSOR_DIGITS, (number + 1) * TENSOR_DIGITS)
            differing += digests[at] != now["tensors"][at]
        counts[role] = (differing, len(of_role))
    return counts


def differing_metrics(run: Path, loop: Loop) -> dict[str, tuple[object, object]]:
    """The step's metrics that are not as the run logged them, but for clocks; those of updates come
    last, because rewards and responses decide them."""
    rows = []
    for directory in (run, loop.store.directory.parent):
        row: dict[str, object] = {}
        for logged in read_jsonl(directory / METRICS):
            if logged["step"] == loop.step and logged["split"] == "train":
                row = dict(logged)
        rows.append(row)
    recorded, now = rows
    different = {}

    def order(name: str) -> tuple[bool, str]:
        return name.partition("/")[0] in loop.trained, name

    for name in sorted(recorded.keys() & now.keys(), key=order):
        if recorded[name] != now[name] and not CLOCKS.search(name):
            different[name] = recorded[name], now[name]
    return different


if __name__ == "__main__":
    main()
