"""The pipeline's rule and data: preferences are the rule's, and every file loads as what its
stage takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig
from transformers import AutoTokenizer

from controllers.data import DataConfig, DemonstrationDataset, PairDataset, PromptDataset
from recipes.rlhf.__main__ import main, stages
from recipes.rlhf.data import Prepared, prepare
from recipes.rlhf.rule import rule, score


def test_the_rule_by_hand() -> None:
    assert (
        rule("312", "123") == 1.0
        and rule("312", "321") == 0.0
        and rule("312", "13") == pytest.approx(2 / 3)
    )
    assert (
        rule("312", "1123") == pytest.approx((1 - 1 / 3) * 2 / 3)
        and rule("312", "") == rule("312", "a12") == rule("312", "999") == 0.0
    )
    assert score("Sort 312", " 123 ", answer="123") == {"reward": 1.0, "exact": 1.0}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("rlhf"))


def test_pairs_prefer_what_the_rule_prefers(prepared: Prepared) -> None:
    for row in pq.read_table(prepared.held_out_pairs).to_pylist():
        digits = row["prompt"][0]["content"].removeprefix("Sort ")
        assert rule(digits, row["chosen"]) > rule(digits, row["rejected"])


def test_every_file_is_what_its_stage_takes(
    prepared: Prepared, composed: Callable[..., DictConfig]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared.model)
    for kind, path, rows in (
        (DemonstrationDataset, prepared.held_out_demonstrations, 256),
        (PairDataset, prepared.held_out_pairs, 256),
        (PromptDataset, prepared.held_out_prompts, 256),
    ):
        assert len(kind.load(DataConfig(train=str(path)), str(path), tokenizer)) == rows
    for command in stages(prepared, Path("out"), []).values():
        assert command[0] == "-m"
        composed(command[1].removeprefix("recipes."), command[2:])


def test_a_mistyped_setting_ends_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["recipes.rlhf", "--output", f"{tmp_path}/run", "algorithm.kl.coeficient=0"]
    )
    with pytest.raises(SystemExit, match="2"):
        main()
    assert not (tmp_path / "run").exists()
