"""Models that can't read what they would get are found before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from recipes.config import RunConfig
from recipes.run import run
from workers.config import ModelConfig
from workers.engines.base import Head
from workers.engines.model.loading import UNLIMITED, position_limit

pytestmark = pytest.mark.usefixtures("nothing_starts")


def test_a_model_of_another_vocabulary_is_found_before_the_start(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Its tokens mean something else by the same numbers: it would score noise."""
    config = settings("distillation")
    shutil.copytree(config.model.path, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["5"], vocabulary["6"] = vocabulary["6"], vocabulary["5"]
    file.write_text(json.dumps(words))
    with pytest.raises(
        ValueError,
        match=(
            r"teacher.model.path is '.*other', of another vocabulary than .*: '[56]' is token "
            r"[56] there and token [56] here"
        ),
    ):
        run(settings("distillation", f"teacher.model.path={tmp_path}/other"))


def test_a_model_with_less_room_than_the_policys_is_found_before_the_start(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    shutil.copytree(settings("distillation").model.path, tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 12}))
    message = (
        r"teacher.model.path is '.*other', whose limit is 12 tokens; the longest prompt of "
        r"data.train has \d+ beside .*_tokens=8; lower"
    )
    with pytest.raises(ValueError, match=message):
        run(settings("distillation", f"teacher.model.path={tmp_path}/other"))


def test_rows_longer_than_the_model_are_found_before_the_start(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    row = {"prompt": "3 " * 200, "response": "4 " * 100, "chosen": "4 " * 100, "rejected": "4"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    for recipe_name in ("sft", "dpo", "reward_model"):
        with pytest.raises(
            ValueError,
            match=(
                r"data.train: its longest row has 301 tokens, and the model's limit is 256; set "
                r"data.max_tokens=256"
            ),
        ):
            run(settings(recipe_name, f"data.train={tmp_path}/rows.jsonl"))


@pytest.mark.parametrize(("model_type", "limit"), [("gpt2", 77), ("bloom", UNLIMITED)])
def test_the_longest_row_of_a_model_is_read_under_its_own_name(
    model_type: str, limit: int, tmp_path: Path
) -> None:
    """gpt2 calls it n_positions; bloom, with ALiBi, has none."""
    sizes = {"n_positions": 77} if model_type == "gpt2" else {}
    AutoConfig.for_model(model_type, **sizes).save_pretrained(tmp_path)
    assert position_limit(ModelConfig(path=str(tmp_path)), Head.lm) == limit
