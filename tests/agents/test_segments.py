"""Episodes of several contexts: rewritten histories, sub-agents, templates that leave thoughts out."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridflow import Batch, open_session
from hybridflow.columns import Ragged
from tests.agents.chat import STRIPS, chat_settings, conversation, saying
from workers.agents.config import EpisodeConfig, History
from workers.agents.endpoint import Endpoint
from workers.agents.live import Finished
from workers.agents.model import Model
from workers.agents.outcome import LimitReached, Outcome
from workers.agents.rows import Row, batch_of, row_of
from workers.losses.aggregation import Aggregation, Counts, weight_columns
from workers.model_worker import sequences_of

THINKS = "<think>\nWell.\n</think>\n\n"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def row(model: Model, turn_rewards: list[float]) -> Row:
    outcome = Outcome(reward=sum(turn_rewards), turn_rewards=turn_rewards)
    return row_of(Finished(segments=model.segments, outcome=outcome), weight_version=0)


def contexts(of: Row) -> list[list[int]]:
    ids = torch.tensor(of.prompt_ids + of.response_ids)
    return [part.tolist() for part in ids.split(of.segment_lengths)]


def test_a_rewritten_history_is_a_further_segment() -> None:
    """An agent that drops its earlier messages keeps its client: each reply is trained on once, in
    the context in which it was drawn, and what it earned stays with it."""
    openai = pytest.importorskip("openai")
    model = conversation(saying(["one", "two", "three", "four"]), reply_tokens=200)

    async def agent() -> None:
        async with (
            Endpoint(model) as url,
            openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ):

            async def ask(messages: list[dict[str, Any]]) -> dict[str, Any]:
                done = await client.chat.completions.create(model="policy", messages=messages)
                return dict(done.choices[0].message.model_dump(exclude_none=True))

            first = await ask([user("a")])
            long = [user("a"), first, user("b")]
            second = await ask(long)
            await ask([user("summary: a b"), second, user("c")])
            await ask([*long, second, user("d")])

    asyncio.run(agent())
    of = row(model, [0.0, 1.0, 2.0, 3.0])
    renderer, decode = model.renderer, model.renderer.tokenizer.decode
    summary, whole = contexts(of)
    told = [user("summary: a b"), {"role": "assistant", "content": "two"}, user("c")]
    assert summary[: -len("three") - 1] == renderer.start(told)
    assert decode(whole).count("<|assistant|>") == 3 and "four" in decode(whole)
    assert decode([t for t, m in zip(of.response_ids, of.loss_mask, strict=True) if m]) == (
        "three<|end|>one<|end|>two<|end|>four<|end|>"
    )
    assert of.turn_rewards == [2.0, 0.0, 1.0, 3.0], "in the order of the row"
    assert of.turn_lengths == [6, 4, 4, 5]


def test_a_template_that_strips_thoughts_can_have_segments() -> None:
    """episode.history=segments: the policy reads what the template writes, without its thoughts."""
    config = EpisodeConfig(history=History.segments)
    said = [THINKS + "one", "two"]
    model = conversation(saying(said), template=STRIPS, config=config, reply_tokens=200)

    async def episode() -> None:
        await model.reply([user("a")])
        await model.reply([user("b")])

    asyncio.run(episode())
    first, second = contexts(row(model, [0.0, 1.0]))
    decode = model.renderer.tokenizer.decode
    assert "Well." in decode(first)
    assert decode(second) == (
        "<|user|>\na<|end|>\n<|assistant|>\none<|end|>\n<|user|>\nb<|end|>\n<|assistant|>\ntwo<|end|>"
    )


def test_limits_hold_for_all_segments_together() -> None:
    config = EpisodeConfig(max_turns=2)
    model = conversation(saying(["one", "two"]), config=config)

    async def episode() -> None:
        await model.reply([user("a")])
        other = model.fork()
        await other.reply([user("b")])
        await model.fork().reply([user("c")])

    with pytest.raises(LimitReached, match="turns"):
        asyncio.run(episode())
    assert model.finish_reason == "turns"
    assert len(row(model, [0.0, 0.0]).segment_lengths) == 2, "the one without a reply is no segment"


def rows_in_segments() -> Batch:
    """Two rows, of which the first has two segments of 3 + 2 and 2 + 3 tokens."""
    first = Row(
        prompt_ids=[1, 2, 3],
        response_ids=[4, 5, 6, 7, 8, 9, 10],
        loss_mask=[True, True, False, False, True, True, True],
        segment_lengths=[5, 5],
        rollout_log_probs=[0.0] * 5,
    )
    second = Row(
        prompt_ids=[1, 2],
        response_ids=[3, 4],
        loss_mask=[True, True],
        segment_lengths=[4],
        rollout_log_probs=[0.0] * 2,
    )
    return batch_of([first, second])


def test_segments_are_sequences_and_rows_stay_rows() -> None:
    """Tokens are cut at segments; means over rows count a row once, whatever its segments."""
    sequences = sequences_of(rows_in_segments())
    assert [part.tolist() for part in sequences.token_ids.split(sequences.lengths.tolist())] == [
        [1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10],
        [1, 2, 3, 4],
    ]
    assert sequences.scored_lengths.tolist() == [2, 3, 2]
    assert sequences.batch_scored_lengths.tolist() == [5, 2]
    assert sequences.of_segments(torch.tensor([7, 8])).tolist() == [7, 7, 8]
    taken = sequences.rows([0, 1])
    assert taken.batch_scored_lengths.tolist() == [5]
    counts = Counts(num_tokens=7, num_rows=2)
    weights = weight_columns(
        sequences.batch_scored_lengths, counts, Aggregation.seq_mean_token_mean
    )
    by_hand = [1 / (2 * 5)] * 5 + [1 / (2 * 2)] * 2
    torch.testing.assert_close(weights["weights"], torch.tensor(by_hand), check_dtype=False)


class Forgets:
    """An agent that begins anew after its first reply."""

    async def __call__(self, model: Model, task: dict[str, Any]) -> float:
        first = await model.reply(task["prompt"])
        other = model.fork()
        await other.reply([user(f"You said {first.text}")])
        second = await model.reply([user("Go on")])
        return float(len(first.text) % 3 + second.text.count("e"))


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_a_run_with_segments(recipe: str, tmp_path: Path) -> None:
    """Log-probs of the training engine against transformers on each segment alone; a whole step
    passes the check of log-probs (actor.consistency=error), and so does a critic's."""
    settings = chat_settings(tmp_path) | {"output_dir": tmp_path / "out"}
    if recipe == "ppo":
        settings["algorithm.samples_per_prompt"] = 1
        settings["critic.train.precision"] = "fp32"
        settings["reference.train.precision"] = "fp32"
    with open_session(recipe, settings, environment=Forgets()) as session:
        batch = session.actor.generate_sequences(next(session.prompts))
        batch |= session.actor.compute_log_prob(batch)
        batch = batch.local(batch.columns)
        metrics = session.step()
    assert metrics["episode/turns"] == 3.0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = []
    for prompt, response, mask, lengths in zip(
        batch.ragged("prompt_ids").unbind(),
        batch.ragged("response_ids").unbind(),
        batch.ragged("loss_mask").unbind(),
        batch.ragged("segment_lengths").unbind(),
        strict=True,
    ):
        assert len(lengths) == 2
        ids, masks = torch.cat([prompt, response]), torch.cat([prompt < 0, mask])
        for part, scored in zip(
            ids.split(lengths.tolist()), masks.split(lengths.tolist()), strict=True
        ):
            with torch.no_grad():
                logits = model(part[None]).logits[0, :-1].float().log_softmax(-1)
            log_probs = logits.gather(-1, part[1:, None])[:, 0]
            expected.append(log_probs[scored[1:]])
    log_probs = batch.ragged("log_probs")
    assert isinstance(log_probs, Ragged)
    torch.testing.assert_close(log_probs.values, torch.cat(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        batch.ragged("rollout_log_probs").values, torch.cat(expected), atol=1e-5, rtol=0
    )
