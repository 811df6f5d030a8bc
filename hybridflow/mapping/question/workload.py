"""Workload: how much work a step is: rows, their lengths with their spread, optimizer updates.

Lengths are quantiles, so that the same description serves means (compute), squares (attention),
maxima (memory) and the long tail (generation). Prompt and response lengths are taken to be
independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import erf, exp, log, sqrt

NUM_QUANTILES = 64
GOLDEN = (sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class Lengths:
    """Token counts as equally likely quantiles, ascending.

    Lengths.parse("1024"), Lengths.parse("uniform:8:64"), Lengths.parse("lognormal:600:4096") (mean
    600, cut at 4096).
    """

    quantiles: tuple[int, ...]

    def __post_init__(self) -> None:
        if (
            not self.quantiles
            or self.quantiles[0] < 0
            or list(self.quantiles) != sorted(self.quantiles)
        ):
            raise ValueError(
                "lengths: quantiles must be ascending and not negative, got "
                f"{self.quantiles[:4]}..."
            )

    @classmethod
    def fixed(cls, tokens: int) -> Lengths:
        return cls((tokens,))

    @classmethod
    def uniform(cls, low: int, high: int) -> Lengths:
        step = (high - low) / NUM_QUANTILES
        return cls(tuple(round(low + step * (index + 0.5)) for index in range(NUM_QUANTILES)))

    @classmethod
    def lognormal(cls, mean: float, longest: int, sigma: float = 0.8) -> Lengths:
        """A long tail: log-normal with the given mean before it is cut at `longest` (the
        engine's limit)."""
        mu = log(mean) - sigma**2 / 2
        quantiles = []
        for index in range(NUM_QUANTILES):
            value = exp(mu + sigma * _normal_quantile((index + 0.5) / NUM_QUANTILES))
            quantiles.append(max(1, min(longest, round(value))))
        return cls(tuple(quantiles))

    @classmethod
    def observed(cls, values: Sequence[int]) -> Lengths:
        """The quantiles of measured lengths (a data set's prompts, an earlier run's responses)."""
        ordered = sorted(values)
        size = len(ordered)
        if size <= NUM_QUANTILES:
            return cls(tuple(ordered))
        quantiles = []
        for index in range(NUM_QUANTILES):
            quantiles.append(ordered[int((index + 0.5) / NUM_QUANTILES * size)])
        return cls(tuple(quantiles))

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Reads a number, uniform:LOW:HIGH or lognormal:MEAN:MAX[:SIGMA]."""
        mistake = (
            f"lengths {text!r}: write a number, uniform:LOW:HIGH, or lognormal:MEAN:MAX[:SIGMA]"
        )
        name, *numbers = text.split(":")
        try:
            if name.isdigit() and not numbers:
                return cls.fixed(int(name))
            if name == "uniform" and len(numbers) == 2:
                return cls.uniform(int(numbers[0]), int(numbers[1]))
            if name == "lognormal" and len(numbers) in (2, 3):
                return cls.lognormal(float(numbers[0]), int(numbers[1]), *map(float, numbers[2:]))
        except ValueError:
            raise ValueError(mistake) from None
        raise ValueError(mistake)

    @cached_property
    def mean(self) -> float:
        return sum(self.quantiles) / len(self.quantiles)

    @cached_property
    def mean_square(self) -> float:
        return sum(value * value for value in self.quantiles) / len(self.quantiles)

    @cached_property
    def longest(self) -> int:
        return self.quantiles[-1]

    def sample(self, count: int) -> list[int]:
        """`count` lengths in an order without trend: quantiles at multiples of the golden ratio
        (evenly spread for every count)."""
        size = len(self.quantiles)
        return [self.quantiles[int((index + 1) * GOLDEN % 1.0 * size)] for index in range(count)]


@dataclass(frozen=True, kw_only=True)
class Asynchrony:
    """Responses that are drawn ahead of the steps that train on them; the fields are a run's
    asynchrony.* (docs/asynchronous.md).

    Asynchrony(staleness=1)
    """

    staleness: int
    look_ahead: float = 1.0
    drains: bool = False
    """New weights wait until no response is being drawn: every step's are drawn together."""
    rereads: bool = True
    """After new weights, the tokens of the responses that are being drawn are read anew."""

    def __post_init__(self) -> None:
        if self.staleness < 1:
            raise ValueError(
                f"asynchrony: staleness is {self.staleness}; use at least 1, or leave asynchrony "
                "out for steps that draw their own responses"
            )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of a step; this is the paper's (section 8.1):

    Workload(batch_size=1024, prompt=Lengths.fixed(1024), response=Lengths.fixed(1024), num_mini_batches=8)
    """

    batch_size: int
    """Prompts of a step."""
    prompt: Lengths
    response: Lengths
    samples_per_prompt: int = 1
    num_mini_batches: int = 1
    """Optimizer updates per epoch over the step's rows."""
    num_epochs: int = 1
    asynchrony: Asynchrony | None = None
    """None: every step draws its own responses, and waits for the longest."""

    def __post_init__(self) -> None:
        counts = {
            "batch_size": self.batch_size,
            "samples_per_prompt": self.samples_per_prompt,
            "num_mini_batches": self.num_mini_batches,
            "num_epochs": self.num_epochs,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"workload: {name} is {value}; it must be at least 1")
        if self.num_mini_batches > self.num_rows:
            raise ValueError(
                f"workload: num_mini_batches is {self.num_mini_batches}, the step has "
                f"{self.num_rows} rows; an update needs at least one row"
            )
        if self.response.longest < 1:
            raise ValueError(
                "workload: every response is empty; give response lengths of at least 1"
            )

    @cached_property
    def num_rows(self) -> int:
        return self.batch_size * self.samples_per_prompt

    @cached_property
    def rows_in_flight(self) -> int:
        """Responses that may be drawn at the same time: those of a step, and of the steps that
        generation is ahead."""
        if self.asynchrony is None or self.asynchrony.drains:
            return self.num_rows
        return self.num_rows * (self.asynchrony.staleness + 1)

    @cached_property
    def tokens_per_row(self) -> float:
        return self.prompt.mean + self.response.mean

    @cached_property
    def longest_row(self) -> int:
        return self.prompt.longest + self.response.longest

    @cached_property
    def num_tokens(self) -> float:
        """Prompt and response tokens of a step, which the paper's throughput counts."""
        return self.num_rows * self.tokens_per_row

    @cached_property
    def attended_per_token(self) -> float:
        """Positions that an average token attends to under a causal mask: E[length^2] / (2
        E[length])."""
        prompt, response = self.prompt, self.response
        square = prompt.mean_square + 2 * prompt.mean * response.mean + response.mean_square
        return square / (2 * self.tokens_per_row)


def _normal_quantile(probability: float) -> float:
    """Inverse of the standard normal distribution function by bisection."""
    low, high = -8.0, 8.0
    for _ in range(60):
        middle = (low + high) / 2
        if (1 + erf(middle / sqrt(2))) / 2 < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2
