"""Several rewards as one: a weighted sum, each part logged by its name."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hybridflow.registry import load_object
from hybridflow.wording import kind_of
from workers.rewards.other_tools import reads_another_tools, rewritten
from workers.rewards.values import STATISTICS, as_number, shortened


@dataclass(kw_only=True)
class RewardPart:
    """reward.parts='{correct: {function: workers.rewards:math}, short: {function: ..., weight:
    0.1}}'"""

    function: str = "???"
    """package.module:name, as reward.function."""
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the function, such as {pattern: "<answer>.*</answer>"}."""


def combined(parts: Mapping[str, RewardPart], role: str) -> CombinedReward:
    """The parts of a reward, gold reward or cost as one function; each one's function by its
    name."""
    settings = {}
    for name, part in parts.items():
        settings[name] = (part.function, part.weight, part.options)
    return CombinedReward(settings, role)


class CombinedReward:
    """CombinedReward({"correct": (math, 1.0, {}), "form": (matches, 0.2, {"pattern": "..."})})

    Called by keyword as every reward is, returns the weighted sum and each part's own value before
    its weight.
    """

    def __init__(
        self, parts: Mapping[str, tuple[Any, float, Mapping[str, Any]]], role: str = "reward"
    ) -> None:
        self.role = role
        self.key = "cost" if role == "cost" else "reward"
        """The name of the sum in what a call returns."""
        if not parts:
            raise ValueError(f"{role}.parts is empty; name at least one part, or leave it out")
        self.parts: dict[str, tuple[Callable[..., Any], float, dict[str, Any]]] = {}
        for name, (function, weight, options) in parts.items():
            if name in {self.key, *STATISTICS}:
                raise ValueError(
                    f"{role}.parts.{name}: {self.key}/{name} is a number of the {self.key}'s own; "
                    "give the part another name"
                )
            if not math.isfinite(weight):
                raise ValueError(f"{role}.parts.{name}.weight is {weight}; use a finite number")
            where = f"{role}.parts.{name}.function"
            found = load_object(function, where) if isinstance(function, str) else function
            if not callable(found):
                raise ValueError(f"{where}={function!r} is {kind_of(found)}, not a function")
            self.parts[name] = (found, weight, dict(options))
        if not any(weight for _, weight, _ in self.parts.values()):
            raise ValueError(
                f"{role}.parts: every weight is 0 ({', '.join(self.parts)}), so that the {self.key} would "
                "always be 0; give one another weight"
            )

    def check_columns(self, names: Iterable[str]) -> None:
        """Whether each part can be called with rows that have these columns; a ValueError names
        the part."""
        for name, (function, _, options) in self.parts.items():
            given = dict.fromkeys(names) | options
            if reads_another_tools(function, given):
                message = rewritten(function, set(given))
                raise ValueError(f"{self.role}.parts.{name}.function {message}")
            try:
                inspect.signature(function).bind(**given)
            except TypeError as error:
                if message := rewritten(function, set(given)):
                    raise ValueError(f"{self.role}.parts.{name}.function {message}") from None
                raise ValueError(
                    f"{self.role}.parts.{name} does not fit the data ({error}): it is called by "
                    f"keyword with {', '.join(given)}; let it end in **columns, or correct "
                    f"data.answer_column, data.columns and {self.role}.parts.{name}.options"
                ) from None

    async def __call__(
        self, /, *, prompt: str, response: str, finish_reason: str, **columns: Any
    ) -> dict[str, float]:
        row = {"prompt": prompt, "response": response, "finish_reason": finish_reason, **columns}
        values = await asyncio.gather(*(self._value(name, row) for name in self.parts))
        numbers: dict[str, float] = {}
        total = 0.0
        for (name, (_, weight, _)), value in zip(self.parts.items(), values, strict=True):
            if isinstance(value, Mapping):
                further = dict(value)
                value = further.pop(self.key, None)
                for key, number in further.items():
                    numbers[f"{name}_{key}"] = number
            score = as_number(value)
            if score is None:
                raise ValueError(
                    f"{self.role}.parts.{name} returned {shortened(value)}; return a finite number"
                )
            numbers[name] = score
            total += weight * score
        return {self.key: total, **numbers}

    async def _value(self, name: str, row: Mapping[str, Any]) -> Any:
        function, _, options = self.parts[name]
        result = function(**{**row, **options})
        return await result if inspect.isawaitable(result) else result
