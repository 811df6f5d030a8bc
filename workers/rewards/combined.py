"""Several rewards as one: a weighted sum, each part logged by its name."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hybridflow.registry import load_object


@dataclass(kw_only=True)
class RewardPart:
    """reward.parts='{correct: {function: workers.rewards:math}, short: {function: ..., weight:
    0.1}}'"""

    function: str = "???"
    """package.module:name, as reward.function."""
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the function, such as {pattern: "<answer>.*</answer>"}."""


def combined(parts: Mapping[str, RewardPart]) -> CombinedReward:
    """The parts as one function; each one's function by its name."""
    return CombinedReward(
        {name: (part.function, part.weight, part.options) for name, part in parts.items()}
    )


class CombinedReward:
    """CombinedReward({"correct": (math, 1.0, {}), "form": (matches, 0.2, {"pattern": "..."})})

    Called by keyword as every reward is, returns the weighted sum and each part's own value before
    its weight.
    """

    def __init__(self, parts: Mapping[str, tuple[Any, float, Mapping[str, Any]]]) -> None:
        if not parts:
            raise ValueError("reward.parts is empty; name at least one part, or leave it out")
        self.parts: dict[str, tuple[Callable[..., Any], float, dict[str, Any]]] = {}
        for name, (function, weight, options) in parts.items():
            where = f"reward.parts.{name}.function"
            found = load_object(function, where) if isinstance(function, str) else function
            if not callable(found):
                raise ValueError(
                    f"{where}={function!r} is a {type(found).__name__}, not a function"
                )
            self.parts[name] = (found, weight, dict(options))

    def check_columns(self, names: Iterable[str]) -> None:
        """Whether each part can be called with rows that have these columns; a ValueError names
        the part."""
        for name, (function, _, options) in self.parts.items():
            given = dict.fromkeys(names) | options
            try:
                inspect.signature(function).bind(**given)
            except TypeError as error:
                raise ValueError(
                    f"reward.parts.{name} does not fit the data ({error}): it is called by "
                    f"keyword with {', '.join(given)}; let it end in **columns, or correct "
                    f"data.answer_column, data.columns and reward.parts.{name}.options"
                ) from None

    async def __call__(
        self, *, prompt: str, response: str, finish_reason: str, **columns: Any
    ) -> dict[str, float]:
        row = {"prompt": prompt, "response": response, "finish_reason": finish_reason, **columns}
        values = await asyncio.gather(*(self._value(name, row) for name in self.parts))
        numbers: dict[str, float] = {}
        total = 0.0
        for (name, (_, weight, _)), value in zip(self.parts.items(), values, strict=True):
            if isinstance(value, Mapping):
                numbers |= {
                    f"{name}_{key}": number for key, number in value.items() if key != "reward"
                }
                value = value["reward"]
            numbers[name] = value
            total += weight * value
        return {"reward": total, **numbers}

    async def _value(self, name: str, row: Mapping[str, Any]) -> Any:
        function, _, options = self.parts[name]
        result = function(**{**row, **options})
        return await result if inspect.isawaitable(result) else result
