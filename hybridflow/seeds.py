"""Seeds: how a run's seed changes draws that already depend on something else (a prompt's id, an
update's number).

Both numbers are combined by exclusive or, after the seed's bits were spread over all 64: seed 0
leaves the other number as it is, and any other seed changes every draw.
"""

from __future__ import annotations

MULTIPLIER = 0x2545F4914F6CDD1D
"""Odd, so that different seeds below 2**64 stay different."""


def spread_seed(seed: int) -> int:
    """The seed's bits spread over 0 to 2**64 - 1.

    >>> spread_seed(0), spread_seed(1) == MULTIPLIER
    (0, True)
    """
    return seed * MULTIPLIER % 2**64


def combine_seed(seed: int, number: int) -> int:
    """A seed for draw `number` (0 to 2**64 - 1) of a run.

    >>> combine_seed(0, 7)
    7
    """
    return spread_seed(seed) ^ number
