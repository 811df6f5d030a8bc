"""The page of models has every family of the benchmark, and a few families run through all of it.

A1: a family that vLLM runs through its Transformers backend, and a reference of the same class, live
in one process in any order.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.families.case import CASES, GAP, Devices
from benchmarks.families.models import FAMILIES
from benchmarks.families.page import label, make_page

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_page_has_every_family_and_case() -> None:
    page = PAGE.read_text()
    assert len({family.model_type for family in FAMILIES}) >= 25
    for family in FAMILIES:
        assert f"| {label(family)} | `{family.model_type}` |" in page
    for case in CASES:
        assert case in page


def test_the_page_says_what_was_not_run_what_was_refused_and_what_failed() -> None:
    row = {
        "family": "GPT-2",
        "case": "one process",
        "ok": True,
        "log_prob_gap": 2e-6,
        "message": "",
    }
    refused = row | {"family": "Phi", "log_prob_gap": None, "message": "set\npacking=false"}
    wrong = row | {"family": "GLM", "log_prob_gap": 0.5, "ok": False}
    rows = {(entry["family"], "one process"): entry for entry in (row, refused, wrong)}
    page = make_page(rows)
    assert "| GPT-2 | `gpt2` | 2.0e-06 | not run | not run | not run |" in page
    assert "| GLM | `glm` | **5.0e-01** | not run" in page
    assert "- Phi, one process, refused: set packing=false" in page
    assert "- one process: 3\n" in page and "Largest gap of the 1 rows that ran: 2.0e-06" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OLMo 2", "GPT-2", "Granite", "Bloom"])
def test_a1_a2_families_in_one_process_with_a_reference(name: str, tmp_path: Path) -> None:
    """GRPO and PPO, one after the other in one process: transformers' classes stay as they are."""
    family = next(entry for entry in FAMILIES if entry.name == name)
    with Devices("one process", tmp_path) as devices:
        for _ in range(2):
            row = devices.measure(family)
            assert row.ok and row.log_prob_gap is not None and row.log_prob_gap < GAP, row.message


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "one process"])
def test_a_family_of_vllms_transformers_backend_on_two_devices(case: str, tmp_path: Path) -> None:
    family = next(entry for entry in FAMILIES if entry.name == "OLMo 2")
    with Devices(case, tmp_path) as devices:
        row = devices.measure(family)
    assert row.ok and row.log_prob_gap is not None and row.log_prob_gap < GAP, row.message
