"""The judge: its prompt, the probability of its yes against transformers, and what is read out of its text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.group import spawn
from hybridflow.pool import LocalPool, PoolSpec
from tests.tiny import make_model
from workers.config import ModelConfig, Precision, TrainConfig
from workers.judge import JudgeWorker, read_verdict
from workers.role_config import JudgeConfig


def config(path: str = "somewhere", **settings: object) -> JudgeConfig:
    return JudgeConfig(model=ModelConfig(path=path), tokenizer=path, **settings)  # type: ignore[arg-type]


def test_the_reward_is_the_probability_of_yes(tmp_path: Path) -> None:
    path = str(make_model(tmp_path / "model", layers=1))
    settings = config(
        path,
        template="{prompt} 5 {response} {hint}",
        yes="3 4",
        no="6",
        train=TrainConfig(precision=Precision.fp32, micro_batch_tokens=20),
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts, responses, hints = ["7 8", "9"], ["5 5 5", "4"], ["2 2", "8"]
    batch = Batch.of(
        prompt_ids=Ragged.of([tokenizer(prompt).input_ids for prompt in prompts]),
        response_ids=Ragged.of([tokenizer(response).input_ids for response in responses]),
        finish_reason=["stop", "stop"],
        num_tokens=torch.tensor([5, 2]),
        extras=[{"hint": hint} for hint in hints],
    )
    with LocalPool(PoolSpec()) as pool:
        judge = spawn(JudgeWorker, pool, settings, role="judge")
        rewards = judge.compute_reward(batch).tensor("rewards")
        with pytest.raises(ValueError, match=r"judge\.template asks for \['hint'\], which the data has not"):
            judge.compute_reward(batch.drop("extras"))
    model = AutoModelForCausalLM.from_pretrained(path)
    for row, text in enumerate(f"{p} 5 {r} {h}" for p, r, h in zip(*_as_decoded(tokenizer, batch), hints, strict=True)):
        asked = tokenizer(text).input_ids
        sums = []
        for word in ("3 4", "6"):
            said = tokenizer(word, add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1]
            sums.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(said)[:, None]).sum())
        assert rewards[row] == pytest.approx(float(torch.sigmoid(sums[0] - sums[1])), abs=1e-5)


def _as_decoded(tokenizer, batch: Batch) -> list[list[str]]:  # type: ignore[no-untyped-def]
    columns = (batch.ragged(name).unbind() for name in ("prompt_ids", "response_ids"))
    return [[tokenizer.decode(ids, skip_special_tokens=True) for ids in column] for column in columns]


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("It is 4, so yes.", {}, (1.0, True)),
        ("yes? On reflection: No", {}, (0.0, True)),
        ("Score: 3, or rather 7.5", {"pattern": r"\d+\.?\d*"}, (7.5, True)),
        ("who knows", {"unreadable_reward": 0.25}, (0.25, False)),
    ],
)
def test_the_last_verdict_counts(text: str, settings: dict[str, object], expected: tuple[float, bool]) -> None:
    assert read_verdict(text, config(**settings)) == expected


def test_an_unreadable_verdict_is_no_reward_of_zero() -> None:
    with pytest.raises(RuntimeError, match=r"no verdict in 'who knows'; change judge\.template"):
        read_verdict("who knows", config())


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match=r"judge\.template is 'good\?'; it must have \{response\}"):
        config(template="good?")
    with pytest.raises(ValueError, match="must be two different words"):
        config(no="Yes")
