"""Reward functions of every kind that a user may hand in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

not_callable = 3


def plain(prompt: str, response: str, **columns: object) -> float:
    return float(len(response))


def named(*, prompt: str, response: str, finish_reason: str, answer: str) -> float:
    return float(response == answer and finish_reason == "stop")


def no_columns(prompt: str, response: str) -> float:
    return 0.0


def with_numbers(*, response: str, **columns: object) -> dict[str, float]:
    return {"reward": np.float32(0.5), "length": len(response)}


def without_reward(**columns: object) -> dict[str, float]:
    return {"score": 1.0}


def raises(*, answer: dict[str, str], **columns: object) -> float:
    return float(answer["missing"])


def not_a_number(*, response: str, **columns: object) -> float:
    return float("nan") if response == "bad" else 1.0


def infinite_detail(**columns: object) -> dict[str, float]:
    return {"reward": 1.0, "ratio": float("inf")}


def nothing(**columns: object) -> None:
    return None


def text(**columns: object) -> str:
    return "1.0"


def of_a_hint(*, response: str, hint: str, **columns: object) -> float:
    return float(hint in response)


def recorded(
    *, prompt: str, response: str, finish_reason: str, **columns: object
) -> dict[str, float]:
    """Writes down what it was asked and what it said, into the file that RECORD names."""
    reward, words = len(response) / 7, len(response.split())
    record = {
        "prompt": prompt,
        "response": response,
        "finish_reason": finish_reason,
        "reward": reward,
    }
    with Path(os.environ["RECORD"]).open("a") as file:
        file.write(json.dumps({**record, "reward/words": words}) + "\n")
    return {"reward": reward, "words": words}
