"""Stage D of the rehearsal: who has a pool's memory when, through whole steps of algorithms and
validation, beside the mapper's bytes of each call (findings 11 and 13; docs/gpu.md)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hybridflow import open_session
from hybridflow.mapping.answer.device_mapping import CallPlan
from recipes.preparation import foresee
from recipes.python_settings import make_settings
from tests.matrix import matrix
from tests.tiny import make_data, tiny_grpo
from tests.workers.watched_engines import EVENTS, HERE, Held, holdings

ENGINE = f"{HERE}WatchedTraining"
ROLES = {
    "ppo": ("actor", "critic", "reference", "reward"),
    "grpo": ("actor", "reference", "reward"),
    "remax": ("actor", "reference", "reward"),
    "distillation": ("actor", "teacher", "reward"),
    "generative_reward": ("actor", "reference", "judge", "reward"),
}
"""Recipe -> its roles that have a model; the reward's is a reward model, with which distillation and
the judge's recipe validate."""
TRAINED = ("actor", "critic")
KINDS = {"generate": "generation", "forward": "inference", "step": "training"}
QUICK: list[tuple[str, bool]] = [("ppo", True), ("distillation", False)]
SLOW = [case for case in product(ROLES, (True, False)) if case not in QUICK]
Key = tuple[str, str]
"""Role and kind of a call."""
MOMENTS_BYTES = 8
"""AdamW's of a parameter, in float32."""


def settings_of(recipe: str, directory: Path, *, offload: bool) -> dict[str, object]:
    settings = tiny_grpo(directory)
    if recipe not in ("grpo", "generative_reward"):
        del settings["algorithm.samples_per_prompt"]
    settings |= {
        "actor.generation.engine": f"{HERE}WatchedGeneration",
        "actor.generation.release_during_training": True,
        "data.validation": make_data(directory / "held_out.jsonl", rows=2),
        "output_dir": directory / "run",
    }
    for role in ROLES[recipe]:
        settings |= {f"{role}.train.engine": ENGINE, f"{role}.train.precision": "fp32"}
        if role in TRAINED:
            settings[f"{role}.train.offload_optimizer"] = offload
        if role in ("judge", "teacher"):
            settings[f"{role}.model.path"] = settings["model.path"]
    settings["reward.model.path"] = reward_model(Path(str(settings["model.path"])), directory)
    if recipe in ("grpo", "generative_reward"):
        settings["actor.loss.kl_coefficient"] = 0.1
    if recipe == "generative_reward":
        settings["judge.template"] = "{prompt} 5 {response}"
        settings |= {"judge.yes": "6", "judge.no": "7"}
    return settings


def reward_model(model: Path, directory: Path) -> Path:
    """`model` with a score head."""
    target = directory / "reward"
    AutoTokenizer.from_pretrained(model).save_pretrained(target)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    scorer.save_pretrained(target)
    return target


def num_parameters(path: Path) -> int:
    model = AutoModelForCausalLM.from_pretrained(path)
    return sum(parameter.numel() for parameter in model.parameters())


def mapped(recipe: str, settings: Mapping[str, object], *, offload: bool) -> dict[Key, CallPlan]:
    """The mapper's calls of the run, with the trained roles' states offloaded or not."""
    changed = dict(settings)
    for role in set(TRAINED) & set(ROLES[recipe]):
        changed[f"{role}.train.offload_optimizer"] = offload
    mapping = foresee(make_settings(recipe, changed))
    return {(call.role, call.kind): call for call in mapping.calls}


@pytest.mark.parametrize("case", matrix(QUICK, SLOW), ids=str)
def test_memory_has_one_owner_and_the_mappers_bytes(case: tuple[str, bool], tmp_path: Path) -> None:
    recipe, offload = case
    settings = settings_of(recipe, tmp_path, offload=offload)
    EVENTS.clear()
    with open_session(recipe, settings) as session:
        session.step()
        session.step()
        session.validate()
    trained = [role for role in TRAINED if role in ROLES[recipe]]
    timeline = holdings(EVENTS, trained)
    assert {held.event.role for held in timeline} == set(ROLES[recipe])
    for held in timeline:
        assert held.generation is (held.event.what == "generate"), held
        if held.generation:
            assert not held.states, held
    moments = MOMENTS_BYTES * num_parameters(Path(str(settings["model.path"])))
    resident = mapped(recipe, settings, offload=False)
    predicted = mapped(recipe, settings, offload=offload)
    compared = set[Key]()
    for held in timeline:
        key = held.event.role, KINDS[held.event.what]
        if key in resident:  # the mapper leaves validation's reward out
            compared.add(key)
            sum_of_timeline = bytes_of(held, resident[key], len(trained), moments)
            total = predicted[key].total_bytes
            if offload or held.states == set(trained):
                assert total == pytest.approx(sum_of_timeline, rel=0.01), (held, predicted[key])
            else:  # the mapper does not count on releasing for optimizer states
                assert total > sum_of_timeline, (held, predicted[key])
    assert compared == {key for key in resident if key[1] != "controller"}


def bytes_of(held: Held, call: CallPlan, num_trained: int, moments: int) -> float:
    """Bytes on the device by the timeline; `call`: the mapper's, with all optimizer states there."""
    parts = dict(call.bytes)
    assert parts.pop("optimizer") == pytest.approx(num_trained * moments, rel=0.01)
    for name in ("generation_weights", "kv_cache"):
        assert (name in parts) is held.generation, call
    return sum(parts.values()) + moments * len(held.states)
