"""Snapshot files: any layout reads what any other wrote, digests do not depend on it, and damage is
named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hybridflow.snapshots.files import Contents, Written, file_name, read_header, write_snapshot
from hybridflow.snapshots.reading import SnapshotFiles
from tests.snapshots.layouts import CUTS, SHAPES, parts, whole_tensors

LAYOUTS = [(cut, ranks) for cut in CUTS for ranks in (1, 2, 3)]


def save(directory: Path, cut: str, ranks: int, seed: int = 0, stamp: str = "1.7") -> Written:
    whole, answers = whole_tensors(seed), []
    for rank in range(ranks):
        path = directory / file_name(rank)
        digests = write_snapshot(path, parts(whole, cut, rank, ranks), {"num_steps": 5}, stamp)
        answers.append(Written(names=tuple(SHAPES), digests=digests, num_bytes=path.stat().st_size))
    return Written.total(answers)


@pytest.mark.parametrize(("cut", "ranks"), LAYOUTS)
def test_any_layout_reads_what_another_wrote(cut: str, ranks: int, tmp_path: Path) -> None:
    """F13 section 1, elastic by construction: 3 cuts x 1 to 3 ranks, into each of the same."""
    save(tmp_path, cut, ranks)
    files, whole = SnapshotFiles(tmp_path), whole_tensors()
    assert files.scalars == {"num_steps": 5} and set(files.names) == set(SHAPES)
    for other_cut, other_ranks in LAYOUTS:
        for rank in range(other_ranks):
            loaded = parts(whole_tensors(seed=1), other_cut, rank, other_ranks)
            files.load(loaded)
            for parameter in loaded:
                for shard in parameter.shards:
                    expected = whole[parameter.name][shard.box.slices]
                    assert torch.equal(shard.tensor, expected), (parameter.name, shard.box)


def test_digests_are_those_of_the_tensors_whatever_the_layout(tmp_path: Path) -> None:
    """And one changed bit changes the digest of its tensor, of no other."""
    digests = []
    for cut, ranks in LAYOUTS:
        digests.append(save(tmp_path / f"{cut}-{ranks}", cut, ranks).digests)
    assert all(np.array_equal(digests[0], other) for other in digests[1:])
    whole = whole_tensors()
    whole["model.norm.weight"].view(torch.int32)[3] ^= 1
    changed = write_snapshot(tmp_path / "0.safetensors", parts(whole, "rows", 0, 1), {})
    assert (changed != digests[0]).tolist() == [name == "model.norm.weight" for name in SHAPES]


def test_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    save(tmp_path, "rows", 1)
    with safe_open(tmp_path / "0.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        for name, expected in whole_tensors().items():
            assert torch.equal(file.get_tensor(name), expected)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: flip(root / "1.safetensors", -5), r"1\.safetensors: .* is corrupt, its digest"),
    (
        lambda root: flip(root / "1.safetensors", 60),
        r"1\.safetensors: .*(header is corrupt|format)",
    ),
    (
        lambda root: (root / "1.safetensors").write_bytes(
            (root / "1.safetensors").read_bytes()[:-9]
        ),
        r"1\.safetensors: is cut off in",
    ),
    (
        lambda root: (root / "1.safetensors").write_bytes(bytes(4000)),
        r"1\.safetensors: has no header",
    ),
    (lambda root: (root / "1.safetensors").write_bytes(b""), r"1\.safetensors: has no header"),
    (
        lambda root: (root / "1.safetensors").unlink(),
        r"is not complete; files of some ranks are miss",
    ),
    (lambda root: save(root, "rows", 1, stamp="1.8"), r"belongs to snapshot '1.7', not to '1.8'"),
    (lambda root: save(root, "rows", 1), r"is there twice in part"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damage_is_named_before_anything_is_written(number: int, tmp_path: Path) -> None:
    """F13-R2's matrix for one snapshot: flipped, cut off, empty, missing, mixed."""
    damage, message = DAMAGE[number]
    save(tmp_path, "rows", 2)
    damage(tmp_path)
    loaded = parts(whole_tensors(seed=1), "rows", 0, 1)
    with pytest.raises(ValueError, match=message) as error:
        files = SnapshotFiles(tmp_path)
        for file in files.files:
            file.check()
        files.load(loaded)
    assert "\n" not in str(error.value)
    untouched = parts(whole_tensors(seed=1), "rows", 0, 1)
    for parameter, before in zip(loaded, untouched, strict=True):
        assert torch.equal(parameter.shards[0].tensor, before.shards[0].tensor)


def test_every_flipped_byte_of_a_file_is_found(tmp_path: Path) -> None:
    save(tmp_path, "columns", 1)
    path = tmp_path / "0.safetensors"
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    for at in (*range(8, 200, 13), *generator.integers(200, len(content), 60).tolist()):
        flip(path, at)
        with pytest.raises((ValueError, KeyError, TypeError)):
            read_header(path).check()
        path.write_bytes(content)


def test_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "flat", 2)
    files = SnapshotFiles(tmp_path)
    for whole, message in (
        ({"model.other": torch.zeros(3)}, r"has no model\.other; it is of another model"),
        ({"model.norm.weight": torch.zeros(25)}, r"has shape \(24,\), the model \(25,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            files.check_cover(parts(whole, "rows", 0, 1))


def test_layouts_cover_everything_once() -> None:
    """The helper of these tests is right: it would hide a mistake otherwise."""
    for (cut, ranks), (name, shape) in product(LAYOUTS, SHAPES.items()):
        seen = torch.zeros(shape)
        for rank in range(ranks):
            for box in CUTS[cut](shape, rank, ranks):
                seen[box.slices] += 1
        assert bool((seen == 1).all()), (cut, ranks, name)


@pytest.mark.parametrize("empty", [True, False])
def test_memory_holds_what_a_file_would_also_of_a_rank_that_writes_nothing(
    empty: bool, tmp_path: Path
) -> None:
    """A rank of an engine that holds everything everywhere has no box of its own."""
    held = parts(whole_tensors(), "rows", 0, 1)
    if empty:
        held = [replace(parameter, shards=()) for parameter in held]
    write_snapshot(tmp_path / "0.safetensors", held, {"num_steps": 5}, "1.7")
    contents = Contents(held, {"num_steps": 5}, "1.7")
    buffer = torch.full((contents.num_bytes,), 255, dtype=torch.uint8)
    totals = contents.copy_to(buffer)
    assert bytes(buffer.numpy()) == (tmp_path / "0.safetensors").read_bytes()
    assert len(totals) == len(held) and bool(totals.any()) is not empty
