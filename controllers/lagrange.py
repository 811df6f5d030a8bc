"""The Lagrange multiplier of Safe-RLHF: how much the cost counts against the reward."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(kw_only=True)
class LagrangeConfig:
    initial: float = 1.0
    """lambda at the start."""
    learning_rate: float = 0.1
    """Learning rate of ln lambda."""
    threshold: float = 0.0
    """Largest mean cost of a response that is allowed; the paper's -d."""
    maximum: float = 5.0
    """lambda stays at or below it."""
    window: int = 128
    """Newest responses over which the mean cost is taken."""

    def __post_init__(self) -> None:
        if not 0 < self.initial <= self.maximum:
            raise ValueError(
                f"algorithm.lagrange.initial is {self.initial}; choose 0 < initial <= maximum "
                f"({self.maximum})"
            )
        if self.learning_rate < 0:
            raise ValueError(
                f"algorithm.lagrange.learning_rate is {self.learning_rate}; use 0 (lambda stays) "
                "or more"
            )
        if self.window < 1:
            raise ValueError(
                f"algorithm.lagrange.window is {self.window}; choose at least 1 response"
            )


class LagrangeMultiplier:
    """multiplier = LagrangeMultiplier(config)
    multiplier.update(batch["costs"].tolist())
    advantages = safe_rlhf(reward_advantages, cost_advantages, multiplier.value)
    multiplier.metrics()   # {"cost/multiplier": 1.05, "cost/window_mean": 0.5}
    """

    def __init__(self, config: LagrangeConfig) -> None:
        self._config = config
        self._costs: deque[float] = deque(maxlen=config.window)
        self.value = config.initial

    @property
    def mean_cost(self) -> float:
        """Mean cost over the window; NaN before the first update."""
        if not self._costs:
            return math.nan
        return math.fsum(self._costs) / len(self._costs)

    def update(self, costs: list[float]) -> None:
        """ln lambda += learning_rate * lambda * (mean cost - threshold), at most ln maximum.

        A gradient step on ln lambda, which keeps lambda positive (Dai et al. 2024; the window as in
        their code).

        costs: one per response of the batch. Nothing happens without costs.
        """
        self._costs.extend(costs)
        if self._costs:
            excess = self.mean_cost - self._config.threshold
            log_value = math.log(self.value) + self._config.learning_rate * self.value * excess
            self.value = math.exp(min(log_value, math.log(self._config.maximum)))

    def metrics(self) -> dict[str, float]:
        return {"cost/multiplier": self.value, "cost/window_mean": self.mean_cost}

    def state_dict(self) -> dict[str, float | list[float]]:
        return {"value": self.value, "costs": list(self._costs)}

    def load_state_dict(self, state: dict[str, float | list[float]]) -> None:
        value, costs = state["value"], state["costs"]
        assert isinstance(value, float) and isinstance(costs, list), (
            f"lagrange: not a state_dict: {state}"
        )
        self.value = value
        self._costs = deque(costs, maxlen=self._config.window)
