"""One family in one case: GRPO with a reference and PPO with a critic, two steps each, on vLLM.

The pools of a case stand for all families: starting processes takes longer than a tiny model's
steps. Everything from settings to roles is what a run does.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.families.family import Family
from benchmarks.families.models import make_model
from benchmarks.families.tokens import FIRST_WORD, VOCABULARY, make_tokenizer
from cluster.connect import ClusterConfig, connect
from controllers import create_algorithm
from controllers.data import RowLoader
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec, ResourcePool
from hybridflow.ray_pool import RayPool
from hybridflow.waiting import CALLS
from recipes.config import RunConfig
from recipes.preparation import Preparation, dry_run_report, prepare
from recipes.python_settings import make_settings
from recipes.session import spawn_roles

ALGORITHMS = ("grpo", "ppo")
MODEL = "/model"
"""Stands for the path of a family's model."""
NUM_PROMPTS, SAMPLES, RESPONSE_TOKENS, NUM_STEPS = 5, 2, 8, 2
PROMPT_TOKENS = (3, 9, 17, 24, 41)
"""Under and over the windows of 16, and over the 32 tokens of longrope's first table."""
GAP = 1e-5
REFUSAL_S = 10.0

CASES: dict[str, list[str]] = {
    "one process": ["runtime=local"],
    "train.tp=2, generation.tp=2": [
        "num_devices=2",
        *(f"{role}.train.tp=2" for role in ("actor", "critic", "reference")),
        "actor.generation.tp=2",
    ],
    "threed pp=2": [
        "num_devices=2",
        *(f"{role}.train.engine=threed" for role in ("actor", "critic", "reference")),
        *(f"{role}.train.pp=2" for role in ("actor", "critic", "reference")),
    ],
    "two pools": [
        "placement=custom",
        "pools.training.num_devices=1",
        "pools.generation.num_devices=1",
        "pools.generation.roles=[generation]",
    ],
}


class Refused(ValueError):
    """The run was refused before anything started."""


@dataclass(kw_only=True)
class Row:
    """The result of one family in one case, over both algorithms."""

    family: str
    case: str
    ok: bool = True
    log_prob_gap: float | None = None
    """Largest difference of a sampled token's log-prob between the training engine and the
    generation engine."""
    message: str = ""
    """Why it did not run: a refusal before anything started, or an error."""
    seconds: float = 0.0


def reward(*, response: str, **_columns: object) -> float:
    """A number between 0 and 1 that any change of a response changes."""
    tokens = [int(word) if word.isdigit() else len(word) for word in response.split()]
    return sum((place + 1) * token for place, token in enumerate(tokens)) % 17 / 16


def make_prompts(path: Path, *, images: bool = False) -> Path:
    """Prompts of several lengths; with `images` the first has none, the others one or two each."""
    generator = np.random.default_rng(0)
    lines = []
    for number, length in enumerate(PROMPT_TOKENS):
        words = " ".join(map(str, generator.integers(FIRST_WORD, VOCABULARY, length)))
        prompt: Any = words
        if images:
            parts: list[dict[str, str]] = [{"type": "text", "text": words}]
            for place in range((number + 1) // 2):
                height, width = 40 + 30 * place, 40 + 20 * number
                pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
                name = f"{number}-{place}.png"
                Image.fromarray(pixels).save(path.parent / name)
                parts.insert(0, {"type": "image", "image": name})
            prompt = [{"role": "user", "content": parts}]
        lines.append(json.dumps({"prompt": prompt, "answer": str(number)}) + "\n")
    path.write_text("".join(lines))
    return path


def settings(algorithm: str, case: str, tokenizer: Path, prompts: Path) -> list[str]:
    """The command line of a run of the model MODEL."""
    roles = {"grpo": ("actor", "reference"), "ppo": ("actor", "critic", "reference")}[algorithm]
    result = [
        f"model.path={MODEL}",
        f"model.tokenizer={tokenizer}",
        f"data.train={prompts}",
        f"data.batch_size={NUM_PROMPTS}",
        f"algorithm.samples_per_prompt={SAMPLES}",
        f"actor.generation.sampling.max_response_tokens={RESPONSE_TOKENS}",
        "actor.generation.sampling.ignore_eos=true",
        "actor.generation.precision=fp32",
        "actor.consistency=off",
        "actor.loss.kl_coefficient=0.1",
        "reward.function=benchmarks.families.case:reward",
        f"output_dir={prompts.parent / 'out'}",
        "metrics.console=false",
        *(f"{role}.train.precision=fp32" for role in roles),
        *(f"{role}.train.optimizer.learning_rate=1e-3" for role in roles if role != "reference"),
    ]
    for setting in CASES[case]:
        if setting.partition(".")[0] in (*roles, "pools", "placement") or "." not in setting:
            result.append(setting)
    if case == "two pools":
        result.append(f"pools.training.roles=[{','.join(roles)},reward]")
    return result


def with_path(config: Any, path: str, other: str) -> Any:
    """The same settings with another path wherever `path` stands: composing them takes longer."""
    changes: dict[str, Any] = {}
    for entry in fields(config):
        value = vars(config)[entry.name]
        if value == path:
            changes[entry.name] = other
        elif is_dataclass(value):
            changes[entry.name] = with_path(value, path, other)
    return replace(config, **changes)


class Devices:
    """The processes of one case, started once and used by all families.

    with Devices("two pools", directory) as devices:
        row = devices.measure(family)
    """

    def __init__(self, case: str, directory: Path) -> None:
        self.case, self.directory = case, directory
        self.tokenizer = make_tokenizer(directory / "tokenizer")
        self.prompts = make_prompts(directory / "prompts.jsonl")
        self.with_images = make_prompts(directory / "images.jsonl", images=True)
        self._settings: dict[str, RunConfig] = {}
        for name in ALGORITHMS:
            arguments = settings(name, case, self.tokenizer, self.prompts)
            self._settings[name] = make_settings(name, arguments)
        self._pools: dict[str, ResourcePool] = {}
        self._resources = ExitStack()

    def __enter__(self) -> Devices:
        if self.case != "one process":
            cluster = ClusterConfig(address="local", worker_logs=False)
            self._resources.enter_context(connect(cluster, cpu_slots=2))
        return self

    def __exit__(self, *error: object) -> None:
        self._close_pools()
        self._resources.close()

    def measure(self, family: Family) -> Row:
        """The family's row; errors become its message."""
        row = Row(family=family.name, case=self.case)
        started = time.perf_counter()
        model = self.directory / family.key
        if not model.exists():
            make_model(family, model)
        try:
            row.log_prob_gap = self._run(
                [self._prepare(name, model, family) for name in ALGORITHMS]
            )
            row.ok = row.log_prob_gap < GAP
        except Refused as refusal:
            row.log_prob_gap, row.message = None, str(refusal)
            took = time.perf_counter() - started
            row.ok = "\n" not in row.message and took < REFUSAL_S
        except Exception as error:  # the row says what happened, and the others go on
            row.ok, row.message = False, f"{type(error).__name__}: {error}"
            self._close_pools()
        row.seconds = round(time.perf_counter() - started, 1)
        return row

    def _prepare(self, algorithm: str, model: Path, family: Family) -> Preparation:
        config = with_path(self._settings[algorithm], MODEL, str(model))
        if family.sees_images:
            tokenizer = self.directory / f"{family.key}-tokenizer"
            make_tokenizer(tokenizer, image=family.image_text)
            config = with_path(config, str(self.tokenizer), str(tokenizer))
            config = with_path(config, str(self.prompts), str(self.with_images))
        config.actor.generation.engine = family.generator
        if not family.packing:
            for role in (config.actor, config.critic, config.reference):
                role.train.packing = False
        try:
            prepared = prepare(config)
            dry_run_report(prepared)
        except ValueError as refusal:
            raise Refused(str(refusal)) from None
        return prepared

    def _run(self, runs: list[Preparation]) -> float:
        """The largest gap of two steps of each algorithm, one after the other on the same roles:
        those of the last one, which has all of them."""
        pools = self._started(runs[-1])
        roles = spawn_roles(runs[-1].placement, pools)
        gaps = []
        try:
            for prepared in runs:
                config = prepared.config
                algorithm = create_algorithm(config.algorithm.name, roles, config.algorithm)
                rows = RowLoader(prepared.train, config.data)
                for _ in range(NUM_STEPS):
                    prompts = rows.take(NUM_PROMPTS).repeat(config.algorithm.samples_per_prompt)
                    metrics = dict(algorithm.step(prompts))
                    CALLS.finish()
                    gaps.append(metrics["actor/log_prob_gap_max"])
        finally:
            for pool in pools.values():
                pool.clear()
        return max(gaps)

    def _started(self, prepared: Preparation) -> dict[str, ResourcePool]:
        for name, size in prepared.placement.pool_sizes.items():
            if name not in self._pools:
                spec = PoolSpec(name=name, num_devices=size, threads_per_device=1)
                local = self.case == "one process"
                self._pools[name] = LocalPool(spec) if local else RayPool(spec)
        return self._pools

    def _close_pools(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools = {}
