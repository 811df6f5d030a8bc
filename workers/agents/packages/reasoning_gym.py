"""Puzzles of reasoning-gym: environment=workers.agents.packages.reasoning_gym:ReasoningGym

A row of data names a puzzle: {"dataset": "chain_sum", "index": 7}, and where wanted the dataset's
"seed" (0) and "config", a dict of its settings. The policy answers once; its last <answer>...
</answer> counts, or all that it says where there is none, and the dataset's own function scores it.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from workers.agents.outcome import EnvironmentMistake

BEGIN, END = "<answer>", "</answer>"


class ReasoningGym:
    """One puzzle."""

    def reset(self, task: dict[str, Any]) -> str:
        for name in ("dataset", "index"):
            if name not in task:
                raise EnvironmentMistake(
                    f"environment=...reasoning_gym: a row of data has no {name!r}; name the puzzle "
                    'as in {"dataset": "chain_sum", "index": 7}'
                )
        index = int(task["index"])
        config = json.dumps(task.get("config") or {}, sort_keys=True)
        self.puzzles = puzzles(task["dataset"], int(task.get("seed", 0)), config)
        self.entry = self.puzzles[index]
        return str(self.entry["question"])

    def step(self, action: str) -> tuple[str, bool, float]:
        return "", True, float(self.puzzles.score_answer(answer_of(action), entry=self.entry))


@functools.cache
def puzzles(name: str, seed: int, config: str) -> Any:
    """The dataset; `config` is a JSON object of further settings."""
    import reasoning_gym

    # Any index may be taken: an entry depends on the seed and the index, not on the size.
    return reasoning_gym.create_dataset(name, seed=seed, size=2**31 - 1, **json.loads(config))


def answer_of(text: str) -> str:
    """The answer inside of the reply."""
    begin = text.rfind(BEGIN)
    if begin < 0:
        return text.strip()
    return text[begin + len(BEGIN) :].partition(END)[0].strip()
