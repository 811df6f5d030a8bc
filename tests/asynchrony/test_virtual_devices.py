"""The table of devices in virtual time: its two pools are balanced, as docs/asynchronous.md says."""

from __future__ import annotations

import pytest

from benchmarks.asynchronous import virtual


@pytest.mark.slow
def test_balanced_pools_are_both_at_work() -> None:
    """Training takes as long as the step it is part of, so that neither pool waits for the other;
    a synchronous step is the sum of the two."""
    train_s = virtual.balanced_train_s()
    row = virtual.measure(1, 1.0, False, train_s)
    assert row["step_s"] == pytest.approx(train_s, rel=virtual.BALANCE_SHARE)
    assert row["idle_generator"] < virtual.BALANCE_SHARE
    assert row["idle_trainer"] < virtual.BALANCE_SHARE
    synchronous = virtual.measure(0, 1.0, False, train_s)["step_s"]
    generation_s = virtual.measure(0, 1.0, False, 0.0)["step_s"]
    assert synchronous == pytest.approx(train_s + generation_s, rel=1e-6)
