"""Stage A of the rehearsal: engines on a GPU that has shapes and no data (docs/gpu.md). A host tensor
among device tensors is an error there; launches, host synchronisations and copies have budgets."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rehearsal.__main__ import CASES, run_case
from tests.matrix import matrix

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no C++ compiler (g++) on this machine"
)
QUICK = [("fsdp", "1")]
SLOW = [case for case in CASES if case not in QUICK]
SYNCS = {"forward": 1.0, "train step": 1.5}
"""Host synchronisations of a micro-batch: a pass gives its results to the host, and a step of two
micro-batches its norm, its metrics and those of routers."""
ZERO_3 = 6.0
"""Host synchronisations and copies that DeepSpeed's stage 3 adds for a micro-batch: it compares the
order of modules over ranks while it records it."""
ZERO_2 = 1.5
"""Host synchronisations of DeepSpeed's stage 2: its backward pass ends with one."""
OFFLOAD_SYNCS = 1.0
"""Host synchronisations for all optimizer states together, on their way to the host."""
SNAPSHOT = 1.0
"""Host synchronisations of a snapshot: its digests, behind the copies to page-locked memory."""
COPIES = 1.0
"""Copies from the host for a micro-batch: all its tensors together."""
LAUNCHES = {
    "sync, a parameter": 20.0,
    "attestation, a parameter": 20.0,
    "sync to another pool, a parameter": 20.0,
}


@pytest.mark.parametrize("case", matrix(QUICK, SLOW), ids=" ".join)
def test_engines_keep_to_the_device_and_to_their_budgets(
    case: tuple[str, ...], tmp_path: Path
) -> None:
    """G26, G32, G33, G39."""
    rows = run_case(tmp_path, *case)
    assert {row["stage"] for row in rows} == {"A"} and len(rows) >= 6
    more = sum(
        amount
        for word, amount in (
            ("zero_stage=3", ZERO_3),
            ("zero_stage=2", ZERO_2),
        )
        if word in case
    )
    for row in rows:
        check(row, more)


def check(row: dict[str, Any], more: float) -> None:
    phase = row["case"].partition(": ")[2]
    if phase in SYNCS:
        assert row["syncs"] <= SYNCS[phase] + more, row
        assert row["copies"] <= COPIES + more, row
    if phase in ("offload", "onload"):
        assert row["syncs"] <= OFFLOAD_SYNCS, row
    if phase == "snapshot":
        assert row["syncs"] <= SNAPSHOT and row["copies"] == 0, row
    if phase in LAUNCHES:
        assert row["launches"] <= LAUNCHES[phase], row
