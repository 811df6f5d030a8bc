"""Files of weights that are damaged, missing or pointers, by their sizes and headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workers.weight_files import check_weight_files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"


def model(directory: Path) -> Path:
    """A sharded model, as transformers writes it."""
    directory.mkdir()
    for number in (1, 2):
        save_file({f"w{number}": torch.ones(100)}, directory / f"part-{number}.safetensors")
    index = {"weight_map": {"w1": "part-1.safetensors", "w2": "part-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_whole_files_and_hub_names_pass(tmp_path: Path) -> None:
    check_weight_files(str(model(tmp_path / "sharded")), "model.path")
    whole = tmp_path / "whole"
    whole.mkdir()
    check_weight_files(str(whole), "model.path")  # a config.json is enough for a plan
    save_file({"w": torch.ones(3), "none": torch.ones(0)}, whole / "model.safetensors", {"a": "b"})
    check_weight_files(str(whole), "model.path")
    check_weight_files("Qwen/Qwen2.5-0.5B", "model.path")


@pytest.mark.parametrize("kept", [0, 5, 30, 200, 400])
def test_a_file_that_was_cut_is_named(tmp_path: Path, kept: int) -> None:
    file = model(tmp_path / "m") / "part-2.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"^actor.model.path is .*m': part-2.safetensors is ") as e:
        check_weight_files(str(file.parent), "actor.model.path")
    assert str(e.value).endswith("; copy or download the file again")


def test_pointers_and_missing_files_are_named(tmp_path: Path) -> None:
    directory = model(tmp_path / "m")
    (directory / "part-1.safetensors").write_text(POINTER)
    with pytest.raises(
        ValueError, match=r"part-1.safetensors is a pointer of Git LFS.*git lfs pull"
    ):
        check_weight_files(str(directory), "model.path")
    (directory / "part-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"part-1.safetensors is missing, but the model's index"):
        check_weight_files(str(directory), "model.path")
    (directory / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json is no index of weights"):
        check_weight_files(str(directory), "model.path")
    (directory / "model.safetensors").write_bytes(b"\xff" * 1000)
    with pytest.raises(
        ValueError, match=r"model.safetensors is damaged: its 1,000 bytes end within"
    ):
        check_weight_files(str(directory), "model.path")
