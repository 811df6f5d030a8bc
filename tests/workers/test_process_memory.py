"""The memory of a CPU process as the kernel counts it, beside tensors of a known size."""

from __future__ import annotations

import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest
import torch

from hybridflow import devices
from hybridflow.context import RankContext
from hybridflow.devices import device_environment, preloaded_allocator
from workers.process_memory import (
    begin_peak,
    device_bytes,
    give_back,
    most_bytes,
    peak_bytes,
    retained_bytes,
)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def test_the_peak_is_that_of_a_span_and_begins_anew() -> None:
    """A9: a peak over a role's update, not of the whole run."""
    size = 200 << 20
    before = anonymous_bytes()
    begin_peak("cpu")
    tensor = torch.ones(size // 4)
    del tensor
    assert size * 0.95 < peak_bytes("cpu") - before < size * 1.3
    begin_peak("cpu")
    assert peak_bytes("cpu") - before < size / 2


def test_freed_memory_goes_back_to_the_system() -> None:
    pieces = [torch.ones(1 << 18) for _ in range(800)]
    last = pieces[-1]
    pieces.clear()
    kept, held = retained_bytes("cpu"), anonymous_bytes()
    give_back("cpu")
    # What is more than the process may keep is gone, whatever the allocator does by itself.
    assert kept < 600 << 20 or held - anonymous_bytes() > 300 << 20
    assert float(last[0]) == 1.0


FREED = """
from pathlib import Path
import torch
from tests.workers.test_process_memory import anonymous_bytes
from workers.process_memory import give_back, retained_bytes

pieces = [torch.ones(1 << 18) for _ in range(800)]
held = anonymous_bytes()
pieces.clear()
kept = retained_bytes("cpu")
assert 800 << 20 <= kept < 900 << 20, kept
assert held - anonymous_bytes() < 50 << 20
give_back("cpu")
assert held - anonymous_bytes() > 700 << 20 and retained_bytes("cpu") < 50 << 20
assert "tcmalloc" in Path("/proc/self/maps").read_text()
"""


@pytest.mark.skipif(not find_library("tcmalloc_minimal"), reason="tcmalloc is not installed")
def test_tcmalloc_keeps_freed_memory_until_it_is_given_back() -> None:
    """800 MiB of tensors; in a process of its own, since the allocator is loaded with the program."""
    environment = {**os.environ, **preloaded_allocator()}
    subprocess.run([sys.executable, "-c", FREED], env=environment, check=True, timeout=120)


def test_tcmalloc_is_preloaded_where_it_is_and_nobody_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    host = RankContext(rank=0, world_size=1)
    for installed, loaded in (
        ({"tcmalloc_minimal": "libtcmalloc_minimal.so.4"}, "libtcmalloc_minimal.so.4"),
        ({"tcmalloc": "libtcmalloc.so.4"}, "libtcmalloc.so.4"),
        ({}, None),
    ):
        monkeypatch.setattr(devices, "find_library", installed.get)
        preloaded_allocator.cache_clear()
        assert device_environment(host).get("LD_PRELOAD") == loaded
    monkeypatch.setattr(devices, "find_library", lambda name: f"lib{name}.so")
    monkeypatch.setenv("LD_PRELOAD", "")
    preloaded_allocator.cache_clear()
    assert "LD_PRELOAD" not in device_environment(host)
    monkeypatch.undo()
    preloaded_allocator.cache_clear()


def test_bytes_of_a_device_are_those_of_everybody_on_it() -> None:
    """G24: PyTorch's allocator knows of neither NCCL nor other processes."""
    free = iter([60, 20, 50])

    def query(device: str) -> tuple[int, int]:
        return next(free), 80

    assert [device_bytes("cuda:9", query) for _ in range(3)] == [20, 60, 30]
    assert most_bytes("cuda:9") == 60
    assert device_bytes("cpu", query) == 0 and most_bytes("cpu") > 0
