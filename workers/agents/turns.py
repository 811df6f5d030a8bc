"""turns_of(): the turns of episodes as text, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from workers.agents.tool_calls import read_calls
from workers.text import ResponseReader


def turns_of(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, read: ResponseReader
) -> list[list[dict[str, object]]]:
    """For every episode its parts in the order of the row:

    {"role": "policy", "text": ..., "num_tokens": 12, "reward": 0.5, "calls": [{"name": ...,
    "arguments": {...}}]}
    {"role": "environment", "text": ..., "seconds": 0.2}

    `seconds` are those between two replies, tools and the episode's own code; the text of a part of
    the environment's has the template's tokens, as the policy read them.
    """
    episodes = []
    for ids, mask, lengths, rewards, further in zip(
        batch.ragged("response_ids").unbind(),
        batch.ragged("loss_mask").unbind(),
        batch.ragged("turn_lengths").unbind(),
        batch.ragged("turn_rewards").unbind(),
        batch.objects("episode_metrics"),
        strict=True,
    ):
        turns = _turns(ids.tolist(), mask.tolist(), lengths.tolist(), tokenizer, read)
        _add_numbers(turns, rewards.tolist(), further.get("turn_s", ()))
        episodes.append(turns)
    return episodes


def _turns(
    ids: Sequence[int],
    mask: Sequence[bool],
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    read: ResponseReader,
) -> list[dict[str, object]]:
    turns: list[dict[str, object]] = []
    start = 0
    for length in [*lengths, 0]:
        end = start
        while end < len(ids) and not mask[end]:
            end += 1
        if end > start:
            text = tokenizer.decode(ids[start:end])
            turns.append({"role": "environment", "text": text})
        if length == 0:
            continue
        (text,) = read([list(ids[end : end + length])])
        turn: dict[str, object] = {"role": "policy", "text": text, "num_tokens": length}
        calls = []
        for call in read_calls(text):
            if not call.mistake:
                calls.append({"name": call.name, "arguments": call.arguments})
        if calls:
            turn["calls"] = calls
        turns.append(turn)
        start = end + length
    return turns


def _add_numbers(
    turns: Sequence[dict[str, Any]], rewards: Sequence[float], seconds: Sequence[float]
) -> None:
    """Adds the reward of each reply, and the seconds that came before it to the part of the
    environment's that it follows. seconds[i]: before reply i; the last one: after all replies."""
    number = 0
    for place, turn in enumerate(turns):
        if turn["role"] == "policy":
            turn["reward"] = rewards[number]
            if place and turns[place - 1]["role"] == "environment" and number < len(seconds):
                turns[place - 1]["seconds"] = seconds[number]
            number += 1
    if turns and turns[-1]["role"] == "environment" and number < len(seconds):
        turns[-1]["seconds"] = seconds[number]
