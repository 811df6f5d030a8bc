"""B77: recipes.evaluate and recipes.generate write their files whatever the columns hold."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hybridflow.whole_file import whole_file
from recipes.python_api import evaluate, generate
from recipes.response_files import parquet_column
from tests.tiny import make_model

DATE = datetime.date(2026, 1, 2)
TIME = datetime.datetime(2026, 1, 2, 3, 4, 5)
AS_THEY_ARE: dict[str, list[Any]] = {
    "text": ["a", "", "ü\u2028"],
    "numbers": [1, 2.5],
    "nothing": [None, None],
    "empty lists": [[], []],
    "nested nulls": [[None, [1, None]], None],
    "not a number": [math.nan, 1.0],
    "same structures": [{"a": 1}, {"a": None}],
    "dates": [DATE, None],
    "times": [TIME, TIME],
    "bytes": [b"\xff", b""],
}
AS_TEXT: dict[str, list[Any]] = {
    "number and text": [1, "2"],
    "list and text": [["1", "2"], "2"],
    "empty structures": [{}, {}],
    "empty structures inside": [{"a": {}}, {"a": {}}],
    "large": [10**30, 1],
    "large and a fraction": [2**60 + 1, 0.5],
    "surrogate": ["bad \ud83d", "x"],
    "surrogate inside": [{"a": ["\ud83d"]}, None],
    "two types": [{"city": "Rome"}, {"zone": "CET"}],
    "two types inside": [{"a": 1}, {"a": "1"}],
    "truth and number": [True, 2],
    "structure and text": [{"a": 1}, "a"],
}


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_b77_what_parquet_holds_stays_as_it_is(name: str, tmp_path: Path) -> None:
    values = AS_THEY_ARE[name]
    pq.write_table(pa.table({name: parquet_column(name, values)}), tmp_path / "file")
    assert repr(pq.read_table(tmp_path / "file")[name].to_pylist()) == repr(
        [1.0, 2.5] if name == "numbers" else values
    )


@pytest.mark.parametrize("name", AS_TEXT)
def test_b77_everything_else_is_json_text(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = AS_TEXT[name]
    pq.write_table(pa.table({name: parquet_column(name, values)}), tmp_path / "file")
    assert [json.loads(text) for text in pq.read_table(tmp_path / "file")[name].to_pylist()] == (
        values
    )
    (record,) = caplog.records
    assert f"column {name!r} is written as JSON text" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_b77_values_that_json_has_no_word_for() -> None:
    assert parquet_column("x", [DATE, 1]).to_pylist() == ['"2026-01-02"', "1"]
    assert parquet_column("x", [b"\xff", "a"]).to_pylist() == ['"/w=="', '"a"']


def test_b77_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []
    with whole_file(path) as temporary:
        temporary.write_text("all")
        assert not path.exists()
    assert [child.name for child in path.parent.iterdir()] == ["file"]


ODD_ROWS = [
    {"prompt": "4 5", "answer": 1, "extra": {}, "large": 10**30, "reward": "a", "row": 7},
    {"prompt": "6", "answer": "2", "extra": {"a": 1}, "large": 1, "reward": "b", "row": 8},
    {"prompt": "7 8 9", "answer": ["1", "2"], "extra": {"b": "\ud83d"}, "large": 2, "sample": 3},
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("files")
    data = directory / "odd.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ODD_ROWS))
    return {
        "runtime": "local",
        "model.path": make_model(directory / "model", layers=1),
        "data.batch_size": 2,
        "data.train": data,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 3,
        "actor.generation.sampling.greedy": False,
        "algorithm.samples_per_prompt": 2,
        "metrics.console": False,
    }


def check_rows(rows: list[dict[str, Any]]) -> None:
    """Each row of the data twice, every value as it was."""
    assert [(row["row"], row["sample"]) for row in rows] == [
        *((0, 0), (0, 1)),
        *((1, 0), (1, 1)),
        *((2, 0), (2, 1)),
    ]
    for row in rows:
        source: dict[str, Any] = ODD_ROWS[row["row"]]
        for name in ("answer", "extra", "large"):
            assert json.loads(row[name]) == source[name], name
        for name in ("row", "sample"):
            assert row[f"data.{name}"] == source.get(name)
        assert row["prompt"] == source["prompt"].replace(" ", "")  # the tokenizer has no decoder


def test_b77_generate(settings: dict[str, object], tmp_path: Path) -> None:
    rows = pq.read_table(generate(settings | {"output_dir": tmp_path})).to_pylist()
    check_rows(rows)
    assert [row["reward"] for row in rows] == ["a", "a", "b", "b", None, None]


def test_b77_evaluate_and_pass_rates(
    settings: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings | {"data.validation": settings["data.train"], "output_dir": tmp_path}
    settings["algorithm.success_reward"] = 0.9
    numbers = evaluate(settings, reward=nine_tenths_for_even)
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    check_rows(rows)
    assert [row["data.reward"] for row in rows] == ["a", "a", "b", "b", None, None]
    assert "the data's column 'reward' is written as 'data.reward'" in caplog.text
    rates = [json.loads(line) for line in (tmp_path / "pass_rates.jsonl").open()]
    for number, rate in enumerate(rates):
        rewards = [row["reward"] for row in rows if row["row"] == number]
        passed = sum(not len(row["response"]) % 2 for row in rows if row["row"] == number)
        assert rate == {
            "row": number,
            "place": f"{settings['data.train']}, line {number + 1}",
            "samples": 2,
            "passed": passed,
            "pass_rate": passed / 2,
            "mean_reward": pytest.approx(sum(rewards) / 2),
        }
    assert numbers["pass@1"] == pytest.approx(sum(rate["pass_rate"] for rate in rates) / 3)
    assert not list(tmp_path.glob(".*"))


def nine_tenths_for_even(*, response: str, **columns: object) -> float:
    return 0.1 if len(response) % 2 else 0.9
