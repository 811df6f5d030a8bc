"""Stage A of the rehearsal: engines on a GPU that has shapes and no data (docs/gpu.md). A host tensor
among device tensors is an error there; launches, host synchronisations and copies have budgets."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rehearsal.__main__ import CASES, run_case, run_module
from tests.matrix import matrix

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no C++ compiler (g++) on this machine"
)
QUICK = [("fsdp", "1")]
SLOW = [case for case in CASES if case not in QUICK]
SYNCS = {"forward": 1.0, "train step": 1.5}
"""Host synchronisations of a micro-batch: a pass gives its results to the host, and a step of two
micro-batches its norm, its metrics and those of routers."""
OFFLOAD_SYNCS = 1.0
"""Host synchronisations for all optimizer states together, on their way to the host."""
SNAPSHOT = 1.0
"""Host synchronisations of a snapshot: its digests, behind the copies to page-locked memory."""
COPIES = 1.0
"""Copies from the host for a micro-batch: all its tensors together."""
MORE = {
    "zero_stage=3": (4.5, 4.0),
    "ep=4": (2.5, 0.5),
    "images": (0.5, 1.0),
}
"""Host synchronisations and copies that a word of a case adds to a micro-batch. DeepSpeed's stage 3
compares the order of modules over ranks while it records it. With divided experts the host learns in
each layer how many tokens travel, and ranks agree on the number of micro-batches. transformers compares
the number of an image's tokens with that of its features, whose places go to the device by
themselves."""
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
    for row in rows:
        check(row, case)


def test_a_decode_step_draws_while_the_model_computes() -> None:
    """G34: the host waits for nothing between the model's launches and those of the draws."""
    rows = run_module("benchmarks.rehearsal.decoding")
    assert [row["case"] for row in rows] == [
        "decoding: the same requests",
        "decoding: others join",
        "decoding: forced",
    ]
    for row in rows:
        assert row["syncs"] == row["pageable"] == 0 and 1 <= row["copies"] <= 2, row


def check(row: dict[str, Any], case: tuple[str, ...]) -> None:
    phase = row["case"].partition(": ")[2]
    if phase in SYNCS:
        more = [MORE[word] for word in case if word in MORE]
        assert row["syncs"] <= SYNCS[phase] + sum(syncs for syncs, _ in more), row
        assert row["copies"] <= COPIES + sum(copies for _, copies in more), row
        assert row["pageable"] <= sum(copies for _, copies in more), row
    if phase in ("offload", "onload"):
        assert row["syncs"] <= OFFLOAD_SYNCS, row
    if phase.startswith("snapshot"):
        assert row["syncs"] <= SNAPSHOT and row["copies"] == 0, row
    if phase in LAUNCHES:
        assert row["launches"] <= LAUNCHES[phase], row
