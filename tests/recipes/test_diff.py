"""python -m recipes.diff on ledgers written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from controllers.ledger import LEDGER, Ledger, Rows
from hybridflow.snapshots.files import Written
from recipes.diff import compare


def run(directory: Path, digests: list[int], rate: float, algorithm: str = "mine") -> str:
    """Three steps of one role with two tensors; digests: of the second one."""
    directory.mkdir()
    ledger = Ledger(directory / LEDGER)
    for step, digest in enumerate(digests):
        written = Written(
            names=("model.a", "model.b"),
            digests=np.array([7 << 40, digest << 40], dtype=np.uint64),
            num_bytes=0,
        )
        ledger.append(ledger.next(step, Rows(), {"row": step}, {"actor": written}))
    (directory / "config.yaml").write_text(
        f"output_dir: {directory}\nactor:\n  train:\n    learning_rate: {rate}\n"
        f"judge: {{seed: {rate}}}\nalgorithm: {{name: {algorithm}}}\n"
    )
    return str(directory)


def test_the_first_tensor_that_differs_is_named_with_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = run(tmp_path / "a", [1, 2, 3], 0.1)
    b = run(tmp_path / "b", [1, 2, 4], 0.2)
    assert compare([a, b]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "actor.train.learning_rate: 0.1 | 0.2",
        "judge.seed: 0.1 | 0.2",
        "step 2 differs in actor: model.b",
    ]
    assert compare([a, a]) == 0
    assert capsys.readouterr().out == "equal: all 3 committed steps, bit for bit\n"


def test_settings_of_models_that_the_runs_do_not_have_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = run(tmp_path / "a", [1], 0.1, "grpo")
    b = run(tmp_path / "b", [1], 0.2, "grpo")
    c = run(tmp_path / "c", [1], 0.3, "generative_reward")
    compare([a, b])
    told = capsys.readouterr().out.splitlines()[:-1]
    assert told == ["actor.train.learning_rate: 0.1 | 0.2"]
    compare([a, c])
    assert "judge.seed: 0.1 | 0.3" in capsys.readouterr().out.splitlines()


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    a = run(tmp_path / "a", [1], 0.1)
    with pytest.raises(ValueError, match=r"b: has no ledger.jsonl"):
        compare([a, str(tmp_path / "b")])
