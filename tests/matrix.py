"""Matrices of cases: the quick ones run always, the slow ones under `make test-slow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def matrix(quick: Iterable[Any], slow: Iterable[Any]) -> list[Any]:
    """All cases for pytest.mark.parametrize, the slow ones marked so."""
    return [*quick, *(pytest.param(case, marks=pytest.mark.slow) for case in slow)]
