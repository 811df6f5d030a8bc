"""Responses drawn ahead in one process, on the engine hf and a tiny model: the synchronous run, bit
for bit, with staleness 0; bounds, resuming and corrections with more."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from controllers.window import Window
from recipes.preparation import prepare
from recipes.python_api import make_settings
from tests.asynchrony.runs import (
    TRUNCATE,
    Record,
    StreamingSession,
    drive,
    equal_weights,
    tiny_settings,
)
from tests.tiny import make_data

DRAIN = TRUNCATE | {"asynchrony.staleness": 1, "asynchrony.in_flight": "drain"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_settings(tmp_path_factory.mktemp("asynchrony"))


@pytest.mark.parametrize("recipe", ["grpo", "dapo", "remax"])
def test_staleness_0_is_the_synchronous_run(
    tiny: dict[str, Any], tmp_path: Path, recipe: str
) -> None:
    """F12, 1: the same responses, losses and weights, bit for bit, for one round of generation, for
    DAPO's further rounds and for ReMax's greedy baseline."""
    calm = drive(tiny, tmp_path / "calm", recipe=recipe, num_steps=2)
    streamed = drive(
        tiny, tmp_path / "streamed", recipe=recipe, session_class=StreamingSession, num_steps=2
    )
    assert streamed.responses == calm.responses
    assert streamed.numbers() == calm.numbers()
    assert streamed.positions == calm.positions
    assert equal_weights(streamed, calm)
    assert all(step["staleness/max"] == 0 for step in streamed.metrics)


@pytest.mark.parametrize("recipe", ["grpo", "dapo", "remax"])
def test_drain_mode_resumes_bit_for_bit(tiny: dict[str, Any], tmp_path: Path, recipe: str) -> None:
    """F12, 8: the responses that waited at the checkpoint are those that the resumed run trains
    on, DAPO's that a later step takes beyond its batch and ReMax's greedy ones included; every
    step's are drawn by the version before."""
    settings = tiny | DRAIN | {"loop.num_steps": 4}
    calm, first = Record(modulus=2), Record(modulus=2)
    drive(settings, tmp_path / "calm", recipe=recipe, num_steps=4, record=calm)
    drive(settings, tmp_path / "resumed", recipe=recipe, num_steps=2, stops=True, record=first)
    resumed = drive(settings, tmp_path / "resumed", recipe=recipe, num_steps=4, record=first)
    if recipe == "dapo":
        assert max(step["dynamic_sampling/rounds"] for step in calm.metrics) > 1
    else:
        assert [step["staleness/mean"] for step in calm.metrics] == [0, 1, 1, 1]
    assert resumed.responses == calm.responses
    assert resumed.numbers() == calm.numbers()
    assert equal_weights(resumed, calm)


@pytest.mark.parametrize("in_flight", ["recompute", "keep"])
def test_no_row_is_lost_or_doubled(tiny: dict[str, Any], tmp_path: Path, in_flight: str) -> None:
    """F12, 3 and 8: over an epoch with a stop in it every row is used once, in order, within the
    bound, whatever was in flight when it stopped."""
    settings = tiny | TRUNCATE
    settings |= {
        "asynchrony.staleness": 1,
        "asynchrony.in_flight": in_flight,
        "loop.num_epochs": 1,
        "loop.num_steps": None,
    }
    record = drive(settings, tmp_path / "run", num_steps=3, stops=True)
    drive(settings, tmp_path / "run", num_steps=8, record=record)
    assert record.positions == [2, 4, 6, 8, 10, 12, 14, 16]
    assert Counter(record.rows) == {str(row): 2 for row in range(16)}
    assert max(step["staleness/max"] for step in record.metrics) in (1, 2, 3)


def test_greedy_baselines_are_drawn_ahead(tiny: dict[str, Any], tmp_path: Path) -> None:
    """ReMax one step ahead, in drain mode: no response is drawn when the step asks for it, and the
    second step's baselines are what transformers' greedy search makes of the weights before the
    first update."""
    settings = tiny | DRAIN | {"loop.num_steps": 3}
    record = drive(settings, tmp_path / "run", recipe="remax", num_steps=3)
    assert not any("actor.generate_sequences" in name for step in record.metrics for name in step)
    lines = Path(tiny["data.train"]).read_text().splitlines()
    model = AutoModelForCausalLM.from_pretrained(tiny["model.path"])
    tokenizer = AutoTokenizer.from_pretrained(tiny["model.path"])
    ends = [tokenizer.eos_token_id, *tiny["actor.generation.sampling.stop_token_ids"]]
    for first in (4, 12):  # each step's four samples come before its four greedy responses
        for row, response in zip(
            record.rows[first:][:4], record.responses[first:][:4], strict=True
        ):
            inputs = tokenizer(json.loads(lines[int(row)])["prompt"], return_tensors="pt")
            (ids,) = model.generate(
                **inputs, do_sample=False, max_new_tokens=24, eos_token_id=ends, pad_token_id=0
            )
            expected = tokenizer.decode(ids[inputs["input_ids"].shape[1] :])
            assert response.split() == expected.split()


@pytest.mark.parametrize("in_flight", ["recompute", "keep"])
def test_further_rounds_ahead(tiny: dict[str, Any], tmp_path: Path, in_flight: str) -> None:
    """DAPO two steps ahead, with groups that teach nothing: whatever a step takes further comes
    from the window, every row once, within the bound."""
    settings = tiny | TRUNCATE | {"asynchrony.staleness": 2, "asynchrony.in_flight": in_flight}
    settings |= {"loop.num_steps": 5, "data.train": make_data(tmp_path / "rows.jsonl", rows=64)}
    record = Record(modulus=2)
    drive(settings, tmp_path / "run", recipe="dapo", num_steps=3, stops=True, record=record)
    drive(settings, tmp_path / "run", recipe="dapo", num_steps=5, record=record)
    assert max(step["dynamic_sampling/rounds"] for step in record.metrics) > 1
    assert not any("actor.generate_sequences" in name for step in record.metrics for name in step)
    assert set(Counter(record.rows).values()) == {2}
    assert len(set(record.rows)) == record.positions[-1]
    bound = Window(groups_per_step=2, staleness=2).bound
    assert 0 < max(step["staleness/max"] for step in record.metrics) <= bound


def test_a_step_that_fails_is_taken_again(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Whatever was in flight or had ended when the step failed: in drain mode the next one trains
    on the responses that it would have trained on."""
    settings = tiny | DRAIN | {"loop.num_steps": 3}
    calm = drive(settings, tmp_path / "calm", num_steps=3)
    record = Record(fails_at=6)  # in the second step
    retried = drive(settings, tmp_path / "retried", num_steps=3, record=record, retries=1)
    assert retried.numbers() == calm.numbers()
    assert retried.positions == calm.positions
    assert equal_weights(retried, calm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"asynchrony.staleness": 1}, "nothing corrects for it"),
        (
            TRUNCATE
            | {
                "asynchrony.staleness": 1,
                "actor.loss.rollout_correction.level": "sequence",
            },
            "level=token",
        ),
        (
            {
                "asynchrony.staleness": 1,
                "actor.loss.name": "policy_gradient",
                "actor.loss.old_policy": "rollout",
            },
            "takes no ratio",
        ),
        (TRUNCATE | {"actor.loss.old_policy": "rollout"}, "nothing reads"),
        ({"asynchrony.staleness": -1}, "asynchrony.staleness is -1"),
        ({"asynchrony.slice_steps": 0}, "asynchrony.slice_steps is 0"),
        ({"asynchrony.in_flight": "drain", "asynchrony.look_ahead": 0.5}, "nothing reads"),
    ],
)
def test_settings_that_can_not_be_right(
    tiny: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    """F9: stale responses without a correction, and the rest, are refused before anything starts."""
    with pytest.raises(ValueError, match=message):
        prepare(make_settings("grpo", tiny | settings, Record().reward, None, None))


def test_the_old_policy_of_the_rollout(tiny: dict[str, Any], tmp_path: Path) -> None:
    """With old_policy=rollout the ratio is taken to the generation engine's log-probs: on fresh
    rows that is 1 to rounding, and the same loss as with the recomputed one."""
    plain = drive(tiny, tmp_path / "plain", num_steps=1)
    rollout = drive(tiny | {"actor.loss.old_policy": "rollout"}, tmp_path / "r", num_steps=1)
    for record in (plain, rollout):
        assert record.metrics[0]["actor/ratio_max"] == pytest.approx(1, abs=1e-5)
    losses = [record.metrics[0]["actor/policy_loss"] for record in (plain, rollout)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
