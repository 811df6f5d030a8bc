"""The memory of a CPU process as the kernel counts it, beside tensors of a known size."""

from __future__ import annotations

from pathlib import Path

import torch

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


def test_bytes_of_a_device_are_those_of_everybody_on_it() -> None:
    """G24: PyTorch's allocator knows of neither NCCL nor other processes."""
    free = iter([60, 20, 50])

    def query(device: str) -> tuple[int, int]:
        return next(free), 80

    assert [device_bytes("cuda:9", query) for _ in range(3)] == [20, 60, 30]
    assert most_bytes("cuda:9") == 60
    assert device_bytes("cpu", query) == 0 and most_bytes("cpu") > 0
