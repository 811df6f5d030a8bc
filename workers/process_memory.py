"""The memory of this process: its peak over a span of work, what the allocator keeps of freed
memory, and giving that back.

On a CPU the bytes are the process' own (files that it maps are left out), with its part of weights
that it shares with other processes; on a GPU they are PyTorch's, without what NCCL and CUDA take,
save those of device_bytes and most_bytes.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

Query = Callable[[str], tuple[int, int]]
STATUS = Path("/proc/self/status")
KEPT_BYTES = 512 << 20
"""Freed memory that stays with a CPU process, whose next call takes it without clearing pages."""

_MOST: dict[str, int] = {}
"""Device -> the largest device_bytes."""
_SHARES: WeakKeyDictionary[object, int] = WeakKeyDictionary()
"""Owner of memory that several processes map -> this process' part of the bytes."""


def begin_peak(device: str) -> None:
    """Begin a span whose peak peak_bytes reports."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # a system that does not offer it: the peak is that of the whole run
        return


def peak_bytes(device: str) -> int:
    """The most memory since begin_peak."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    sizes = _status()
    if "VmHWM" not in sizes:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mapped = sizes.get("RssFile", 0) + sizes.get("RssShmem", 0)
    return sizes["VmHWM"] - mapped + sum(_SHARES.values())


def count_shared(owner: object, num_bytes: int) -> None:
    """Have peak_bytes count `num_bytes`, this process' part of memory that it shares with others,
    as long as `owner` lives."""
    _SHARES[owner] = num_bytes


def device_bytes(device: str, query: Query = torch.cuda.mem_get_info) -> int:
    """Bytes of a GPU that are in use, whoever has them: NCCL, CUDA contexts and other processes too;
    0 on a CPU. `query` says of a device how many bytes are free and how many there are. The most of
    all times that this was called is kept for most_bytes."""
    if not device.startswith("cuda"):
        return 0
    free, total = query(device)
    _MOST[device] = max(_MOST.get(device, 0), total - free)
    return total - free


def most_bytes(device: str) -> int:
    """On a GPU the largest device_bytes so far, and on a CPU the most memory that this process had."""
    if device.startswith("cuda"):
        return _MOST.get(device, 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def retained_bytes(device: str) -> int:
    """Freed memory that the allocator has not given back; 0 where it does not say. On a CPU with
    glibc's an upper bound: some of the interpreter's own memory counts with it."""
    if device.startswith("cuda"):
        return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _allocator().retained()


def give_back(device: str, kept_bytes: int = KEPT_BYTES) -> None:
    """Return freed memory to the system where it is more than what a CPU process may keep."""
    if not device.startswith("cuda") and retained_bytes(device) > kept_bytes:
        _allocator().trim()


class _Allocator:
    """The C library's, of which nothing is known."""

    def retained(self) -> int:
        """Freed bytes that were not given back."""
        return 0

    def trim(self) -> None:
        """Give them back."""


class _Statistics(ctypes.Structure):
    """glibc's struct mallinfo2."""

    uordblks: int
    fordblks: int
    hblkhd: int
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


class _Glibc(_Allocator):
    def __init__(self, library: ctypes.CDLL) -> None:
        self._statistics: Callable[[], _Statistics] = library.mallinfo2
        self._trim: Callable[[int], int] = library.malloc_trim
        library.mallinfo2.restype = _Statistics
        library.malloc_trim.argtypes = [ctypes.c_size_t]

    def retained(self) -> int:
        if "RssAnon" not in _status():
            return 0
        numbers = self._statistics()
        outside = _status()["RssAnon"] - numbers.uordblks - numbers.hblkhd
        return max(0, min(outside, numbers.fordblks))

    def trim(self) -> None:
        self._trim(0)


class _Tcmalloc(_Allocator):
    """gperftools', preloaded (hybridflow/devices.py)."""

    FREE = ("pageheap", "central_cache", "transfer_cache", "thread_cache")

    def __init__(self, library: ctypes.CDLL) -> None:
        self._property: Callable[[bytes, Any], int] = library.MallocExtension_GetNumericProperty
        self._release: Callable[[], None] = library.MallocExtension_ReleaseFreeMemory
        library.MallocExtension_ReleaseFreeMemory.restype = None

    def retained(self) -> int:
        total, value = 0, ctypes.c_size_t()
        for kind in self.FREE:
            name = f"tcmalloc.{kind}_free_bytes".encode()
            if self._property(name, ctypes.byref(value)):
                total += value.value
        return total

    def trim(self) -> None:
        self._release()


@cache
def _allocator() -> _Allocator:
    library = ctypes.CDLL(None)
    for kind in (_Tcmalloc, _Glibc):
        try:
            return kind(library)
        except AttributeError:
            continue
    return _Allocator()


def _status() -> dict[str, int]:
    """Sizes of /proc/self/status in bytes, by name; empty where there is none."""
    sizes = {}
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            sizes[name] = int(value.removesuffix(" kB")) * 1024
    return sizes
