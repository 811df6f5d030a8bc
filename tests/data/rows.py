"""Rows, the files they are in, and what is loaded of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from controllers.data import DataConfig, PromptDataset, RowDataset
from tests.data.kinds import make

ROWS = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(1, 6)]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def load(
    where: Any, kind: type[RowDataset] = PromptDataset, tokenizer: Any = None, **options: Any
) -> RowDataset:
    where = str(where) if isinstance(where, Path) else where
    field = options.pop("field", "data.train")
    config = DataConfig(train=where, **options)
    return kind.load(config, where, tokenizer or make("byte_level", "chatml"), field=field)


def answers(dataset: RowDataset) -> list[Any]:
    return [row["answer"] for row in dataset.all().objects("extras")]


def row_of(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a", "answer": "b"} | changes
