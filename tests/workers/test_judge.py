"""The judge: its prompt, the probability of its yes against transformers, and what is read out
of its text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.group import spawn
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec
from tests.tiny import make_model
from workers.config import ModelConfig, Precision, TrainConfig
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.judge import JudgeWorker, Questions, VerdictWorker, read_verdict
from workers.role_config import JudgeRoleConfig, VerdictKind


def config(path: str = "somewhere", **settings: object) -> JudgeRoleConfig:
    model = ModelConfig(path=path)
    return JudgeRoleConfig(model=model, policy=model, **settings)  # type: ignore[arg-type]


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
        with pytest.raises(
            ValueError,
            match=r"judge\.template asks for \['hint'\], which the data has not, or has as null",
        ):
            judge.compute_reward(batch.drop("extras"))
        with pytest.raises(
            ValueError,
            match=(
                r"have 30\d tokens, and the limit of judge\.model\.path='.*' is 256; "
                r"shorten judge\.template"
            ),
        ):
            judge.compute_reward(batch.drop("extras") | Batch.of(extras=[{"hint": "3 " * 295}] * 2))
    model = AutoModelForCausalLM.from_pretrained(path)
    for row, text in enumerate(
        f"{p} 5 {r} {h}" for p, r, h in zip(*_as_decoded(tokenizer, batch), hints, strict=True)
    ):
        asked = tokenizer(text).input_ids
        sums = []
        for word in ("3 4", "6"):
            said = tokenizer(word, add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1]
            sums.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(said)[:, None]).sum())
        assert rewards[row] == pytest.approx(float(torch.sigmoid(sums[0] - sums[1])), abs=1e-5)


def test_the_question_goes_through_the_judges_chat_template(tmp_path: Path) -> None:
    path = str(make_model(tmp_path / "model", layers=1))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = (
        "8 {{ messages[0].content }} 1{% if add_generation_prompt %} 9{% endif %}"
    )
    tokenizer.save_pretrained(path)
    questions = Questions(config(path, template="{prompt} 5 {response} {{6}}"))
    assert questions.ask({"prompt": "3", "response": "4"}) == [8, 3, 5, 4, 6, 1, 9], (
        "a brace is no word of this tokenizer"
    )


def _as_decoded(tokenizer, batch: Batch) -> list[list[str]]:  # type: ignore[no-untyped-def]
    columns = (batch.ragged(name).unbind() for name in ("prompt_ids", "response_ids"))
    return [
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in column] for column in columns
    ]


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("It is 4, so yes.", {}, (1.0, True)),
        ("yes? On reflection: No", {}, (0.0, True)),
        ("Score: 3, or rather 7.5", {"pattern": r"\d+\.?\d*"}, (7.5, True)),
        ("Score: 3 of 9", {"pattern": r"Score: (\d+)"}, (3.0, True)),
        ("who knows", {"unreadable_reward": 0.25}, (0.25, False)),
        ("infinity or nan", {"unreadable_reward": 0.25, "pattern": r"\w+"}, (0.25, False)),
    ],
)
def test_the_last_verdict_counts(
    text: str, settings: dict[str, object], expected: tuple[float, bool]
) -> None:
    assert read_verdict(text, config(verdict=VerdictKind.written, **settings)) == expected


def test_what_the_judge_wrote_is_read_row_by_row(tmp_path: Path) -> None:
    """Against transformers' own greedy text; what can't be read is counted, or stops the run;
    draws do not depend on the other rows."""
    path = str(make_model(tmp_path / "model", layers=1, tied=False))
    generation = GenerationConfig(
        engine="hf",
        precision=Precision.fp32,
        sampling=SamplingConfig(greedy=True, max_response_tokens=2),
    )
    settings = config(
        path,
        verdict=VerdictKind.written,
        template="{prompt} {response}",
        pattern=r"\b\d*[0-5]\b",
        unreadable_reward=-1.5,
        generation=generation,
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts, responses = ["7 8", "9", "30 31", "44", "60 3"], ["5 5 5", "4", "70", "90 91", "8"]
    batch = Batch.of(
        prompt_ids=Ragged.of([tokenizer(prompt).input_ids for prompt in prompts]),
        response_ids=Ragged.of([tokenizer(response).input_ids for response in responses]),
        finish_reason=["stop"] * 5,
        num_tokens=torch.tensor([5, 2, 3, 3, 3]),
    )
    model = AutoModelForCausalLM.from_pretrained(path)
    expected = []
    for prompt, response in zip(*_as_decoded(tokenizer, batch), strict=True):
        asked = tokenizer(f"{prompt} {response}", return_tensors="pt").input_ids
        said = tokenizer.decode(
            model.generate(asked, do_sample=False, max_new_tokens=2)[0, asked.shape[1] :],
            skip_special_tokens=True,
        )
        read = [word for word in said.split() if word[-1] in "012345"]
        expected.append(float(read[-1]) if read else -1.5)
    assert -1.5 in expected and max(expected) > 0, "some can be read and some can't"
    drawing = replace(
        settings, generation=replace(generation, sampling=SamplingConfig(max_response_tokens=2))
    )
    with LocalPool(PoolSpec()) as pool:
        judged = spawn(VerdictWorker, pool, settings, role="judge").compute_reward(batch)
        assert judged.tensor("rewards").tolist() == expected
        unreadable = [row["unreadable"] for row in judged.objects("reward_metrics")]
        assert unreadable == [float(reward == -1.5) for reward in expected]
        with pytest.raises(RuntimeError, match=r"judge: no verdict in "):
            strict = replace(settings, unreadable_reward=None)
            spawn(VerdictWorker, pool, strict, role="strict").compute_reward(batch)
        sampler = spawn(VerdictWorker, pool, drawing, role="sampler")
        drawn, turned = (
            sampler.compute_reward(rows).tensor("rewards")
            for rows in (batch, batch.rows(np.array([4, 3, 2, 1, 0])))
        )
        assert torch.equal(drawn, turned.flip(0)) and drawn.tolist() != expected


def test_an_unreadable_verdict_is_no_reward_of_zero() -> None:
    with pytest.raises(RuntimeError, match=r"no verdict in 'who knows'; change judge\.template"):
        read_verdict("who knows", config())


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match=r"judge\.template is 'good\?'; it must have \{response\}"):
        config(template="good?")
    with pytest.raises(
        ValueError,
        match=r"judge\.template is '\{response\} \{' .*a brace that is text is written twice",
    ):
        config(template="{response} {")
    with pytest.raises(ValueError, match=r"judge\.pattern is '\(', which is no regular expression"):
        config(pattern="(", verdict=VerdictKind.written)
    with pytest.raises(
        ValueError, match=r"judge\.pattern is '\(a\)\(b\)' with 2 groups; use one for the verdict"
    ):
        config(pattern="(a)(b)", verdict=VerdictKind.written)
    with pytest.raises(ValueError, match=r"judge\.unreadable_reward is nan; give a finite reward"):
        config(unreadable_reward=float("nan"), verdict=VerdictKind.written)
    with pytest.raises(
        ValueError,
        match=(
            r"judge\.unreadable_reward is 0\.5, which nothing reads with "
            r"judge\.verdict=probability"
        ),
    ):
        config(unreadable_reward=0.5)
    with pytest.raises(ValueError, match="must be two different words"):
        config(no="Yes")
