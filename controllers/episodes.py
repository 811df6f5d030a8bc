"""The numbers of a batch of episodes: turns, tokens, seconds, failures."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from hybridflow.batch import Batch
from workers.agents.outcome import FAILED


def whole_rows(batch: Batch) -> Tensor:
    """bool [rows]: all but those of episodes whose group was given up, which have no reward."""
    return torch.tensor([reason != FAILED for reason in batch.objects("finish_reason")])


def episode_metrics(batch: Batch) -> dict[str, float]:
    """Means over the episodes that came to an end, the shares of those that a limit ended, and the
    number that failed, by kind of error; nothing where responses are no episodes."""
    if "episode_metrics" not in batch:
        return {}
    reasons = batch.objects("finish_reason")
    further = batch.objects("episode_metrics")
    turns, sampled = batch.ragged("turn_lengths").lengths, batch.tensor("num_sampled")
    whole = whole_rows(batch)
    failures: Counter[str] = Counter()
    for of_row, reason in zip(further, reasons, strict=True):
        failures.update(f"episode/failed/{kind}" for kind in of_row["failures"])
        if reason == FAILED:
            failures["episode/given_up"] += 1
    metrics = {"episode/given_up": 0.0}
    metrics |= {name: float(number) for name, number in failures.items()}
    if not whole.any():
        return metrics
    count = int(whole.sum())
    environment_s, tool_s = 0.0, 0.0
    for of_row, counted in zip(further, whole.tolist(), strict=True):
        if counted:
            environment_s += of_row["environment_s"]
            tool_s += of_row["tool_s"]
    return metrics | {
        "episode/turns": float(turns[whole].float().mean()),
        "episode/sampled_tokens": float(sampled[whole].float().mean()),
        "episode/environment_seconds": environment_s / count,
        "episode/tool_seconds": tool_s / count,
        "episode/context_full": reasons.count("context") / count,
        "episode/turns_full": reasons.count("turns") / count,
    }
