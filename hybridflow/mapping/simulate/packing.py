"""The tokens of an update's micro-batches: whole rows, and whole groups of a prompt's samples where
they share its tokens, packed under the budget as the engines do (first-fit decreasing).

Leaves out that a row's last token is not computed.
"""

from __future__ import annotations

from functools import lru_cache

from hybridflow.mapping.question.layouts import ModelLayout
from hybridflow.mapping.question.workload import Workload
from hybridflow.mapping.simulate.compute import rounds

MOST_GROUPS = 64
"""Prompts of a data replica that are looked at: more change the fullest micro-batch little."""


def fullest_micro_batches(
    layout: ModelLayout, workload: Workload, *, share_prompts: bool
) -> tuple[float, float]:
    """Tokens of the first micro-batch of an update, and of the largest later one (0 without)."""
    rows = rounds(workload.num_rows / workload.num_mini_batches, layout.d)
    samples = min(workload.samples_per_prompt, rows)
    groups = min(MOST_GROUPS, rounds(rows, samples))
    return _packed(workload, layout.micro_batch_tokens, groups, samples, share_prompts)


@lru_cache(maxsize=4096)
def _packed(
    workload: Workload, budget: int, groups: int, samples: int, share_prompts: bool
) -> tuple[float, float]:
    prompts = workload.prompt.sample(groups)
    responses = workload.response.sample(groups * samples)
    units: list[int] = []
    for group, prompt in enumerate(prompts):
        rows = responses[group * samples : (group + 1) * samples]
        if share_prompts:
            units += _parts(prompt, rows, budget)
        else:
            units += [prompt + response for response in rows]
    bins: list[int] = []
    for unit in sorted(units, reverse=True):
        for place, filled in enumerate(bins):
            if filled + unit <= budget:
                bins[place] += unit
                break
        else:
            bins.append(unit)
    return float(bins[0]), float(max(bins[1:], default=0))


def _parts(prompt: int, rows: list[int], budget: int) -> list[int]:
    """Tokens of the parts of a group: its rows, as many at a time as the budget has room for beside
    their prompt."""
    parts = [prompt]
    for row in rows:
        if parts[-1] > prompt and parts[-1] + row > budget:
            parts.append(prompt)
        parts[-1] += row
    return parts
