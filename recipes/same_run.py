"""Whether a run goes on with the run whose checkpoint it finds: the settings that make a run what
it is are written into every checkpoint, and held against those of the run that resumes from it.

What may change between the two is not among them: steps, logging, placement, layouts, micro-batches,
how often and how much is saved and validated. Data, shuffling and their seed are compared as the
data's position is restored (controllers/data/loader.py), as soon as the rows are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

from controllers.data import RowDataset, RowLoader
from hybridflow.checkpoint import CheckpointStore
from hybridflow.manifest import read_manifest
from hybridflow.recovery.attempts import Attempt
from hybridflow.snapshots.memory import MemoryPlace
from recipes.placing import Placement
from recipes.roles import GENERATION, Role
from workers.agents.config import EpisodeActorConfig
from workers.agents.interfaces import environment_name
from workers.config import ModelConfig
from workers.reward_function import function_name
from workers.rewards.combined import CombinedReward
from workers.role_config import JudgeConfig, RewardConfig
from workers.roles import TrainedRole

RUN = "run"
"""The name of these settings in a checkpoint's metadata."""
VERDICT = ("verdict", "template", "yes", "no", "pattern")
"""Settings of a judge that decide its verdicts."""


def checkpoint_store(
    placement: Placement, directory: Path, attempt: Attempt | None = None
) -> CheckpointStore:
    """The run's checkpoints; the best is chosen by the algorithm's objective. `attempt`: that of
    the controller that writes them."""
    loop = placement.config.loop
    return CheckpointStore(
        directory / "checkpoints",
        keep_last=loop.keep_last,
        keep_best=loop.keep_best,
        metric=placement.entry.objective,
        mode=placement.entry.best,
        attempt=attempt,
    )


def run_settings(placement: Placement) -> dict[str, str]:
    """Name -> value, as text, of every setting that makes the run what it is."""
    config = placement.config
    settings = {"algorithm.name": config.algorithm.name, "model.tokenizer": tokenizer(config.model)}
    for role in placement.roles:
        if role.name != GENERATION:
            settings |= dict(role_settings(role))
    return settings


def role_settings(role: Role) -> Iterator[tuple[str, str]]:
    config, name = role.config, role.name
    if isinstance(config, RewardConfig) and config.function is not None:
        yield f"{name}.function", scorer(config)
        return
    if isinstance(config, EpisodeActorConfig):
        yield "environment", environment_name(config.environment)
    if config.model is not None:
        yield f"{name}.model.path", place(config.model.path)
        yield f"{name}.model.revision", str(config.model.revision)
        yield f"{name}.model (its config.json)", content(config.model)
    yield f"{name}.train.precision", str(config.train.precision)
    if issubclass(role.worker, TrainedRole):
        yield f"{name}.train.engine", config.train.engine
        lora = config.train.lora
        if lora.enabled:
            yield f"{name}.train.lora", json.dumps(vars(lora), sort_keys=True)
    if isinstance(config, JudgeConfig):
        for setting in VERDICT:
            yield f"{name}.{setting}", str(vars(config)[setting])


def scorer(config: RewardConfig) -> str:
    """The function, or the parts with their weights and options."""
    function = config.function
    if not isinstance(function, CombinedReward):
        return function_name(function)
    parts = {}
    for name, (part, weight, options) in function.parts.items():
        parts[name] = {"function": function_name(part), "weight": weight, "options": options}
    return json.dumps(parts, sort_keys=True, default=str)


def place(path: str) -> str:
    """A directory by its whole path, a hub name as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def tokenizer(model: ModelConfig) -> str:
    return place(model.tokenizer or model.path)


def content(model: ModelConfig) -> str:
    """A digest of the sizes in the model's directory; empty for a hub name."""
    path = Path(model.path) / "config.json"
    if not path.is_file():
        return ""
    return hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()


def newest_state(placement: Placement) -> tuple[Path, dict[str, Any]] | None:
    """The commit that the run goes on from, and what the controller noted in it; None: it begins anew.
    Nothing is read but the checkpoint's manifest, or the record of a snapshot in memory."""
    config = placement.config
    if config.loop.resume == "never":
        return None
    directory = Path(config.loop.resume)
    if config.loop.resume == "auto":
        output = Path(config.output_dir).absolute()
        latest = checkpoint_store(placement, output).latest()
        number = latest.sequence if latest is not None else 0
        staged = MemoryPlace.commits_of(output)
        if staged and staged[0].number > number:
            return staged[0].path, staged[0].state
        if latest is None:
            return None
        directory = latest.path
    return directory, read_manifest(directory)["metadata"]


def check_same_run(placement: Placement) -> None:
    """A ValueError where the run would go on from the checkpoint of another one; its data are
    compared by check_same_data."""
    newest = newest_state(placement)
    if newest is None or newest[1].get(RUN) is None:
        return
    directory, state = newest
    differences = list(differing(state[RUN], run_settings(placement)))
    if differences:
        raise ValueError(
            f"output_dir={placement.config.output_dir}: {directory} is the checkpoint of another run: "
            f"{'; '.join(differences)}. Set these as they were to go on with it, or another "
            "output_dir (or loop.resume=never) to start anew"
        )


def check_same_data(placement: Placement, train: RowDataset, pretraining: RowLoader | None) -> None:
    """A ValueError where the commit's positions mean nothing in these rows."""
    newest, config = newest_state(placement), placement.config
    if newest is None or "data" not in newest[1]:
        return
    directory, state = newest
    was_set = "pretraining" in state["further"]
    if was_set != (pretraining is not None):
        before = "was set" if was_set else "was not set"
        raise ValueError(
            f"resume: data.pretraining {before} in the run of {directory}, and is otherwise now; set "
            "it as it was, or start anew in another output_dir"
        )
    position = dict(state["data"])
    if config.asynchrony.staleness:  # the stream of rows ahead looks at these
        position.pop("ahead", None)
    RowLoader(train, config.data).load_state_dict(position)
    if pretraining is not None:
        copy(pretraining).load_state_dict(state["further"]["pretraining"])


def differing(earlier: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """In words: each setting that is not the same. Those of models that only one of the two runs
    has are told by the algorithm where that differs too."""
    names = dict.fromkeys([*now, *earlier])
    if earlier["algorithm.name"] != now["algorithm.name"]:
        names = {name: None for name in names if name in earlier and name in now}
    for name in names:
        there, here = earlier.get(name, "not set"), now.get(name, "not set")
        if there != here:
            yield f"{name} is {here!r} now and was {there!r}"
