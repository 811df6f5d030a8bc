"""A reward that a random model's responses differ in, so that its weights change."""

from __future__ import annotations


def varied(prompt: str, response: str, **columns: object) -> float:
    """The length's remainder by 7, from 0 to 1."""
    return len(response) % 7 / 6
