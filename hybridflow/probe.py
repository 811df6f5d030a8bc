"""Probe: a fixed piece of work whose duration tells how fast a host computes, at about 10 ms a time.

    probe = Probe("cpu")
    probe.seconds()             # of the same work on every host of a kind; NaN: no turn, no memory

No collective is in it: a collective takes as long on the fast ranks as on the slow one. Hosts with a
CPU device take turns on their node, since they may have fewer cores than threads and would measure
each other. Neither random numbers nor gradients are touched.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SIZE = {"cpu": 256, "cuda": 2048}
"""Rows and columns of the matrices that are multiplied: float32."""
NUM_COPIED = {"cpu": 1 << 20, "cuda": 1 << 23}
"""Numbers that are copied after each product: float32."""
NUM_REPEATS = {"cpu": 16, "cuda": 16}
TURN_S = 0.2
"""How long a host waits for its turn: one that is stopped while it has the turn stops no other."""
POLL_S = 0.0005


class Probe:
    """See above; `device` as PyTorch names it. Keeps its matrices."""

    def __init__(self, device: str) -> None:
        self._kind = device.partition(":")[0]
        self._device = device
        self._tensors: tuple[torch.Tensor, ...] = ()

    def seconds(self) -> float:
        if self._kind == "cuda":
            return self._measured()
        with turn(TURN_S) as is_ours:
            return self._measured() if is_ours else math.nan

    def _measured(self) -> float:
        try:
            if not self._tensors:
                self._tensors = self._allocated()
                self._work()  # the first time also loads kernels
            self._wait()
            started = time.perf_counter()
            self._work()
            self._wait()
            return time.perf_counter() - started
        except torch.cuda.OutOfMemoryError:
            return math.nan

    def _allocated(self) -> tuple[torch.Tensor, ...]:
        size, copied = SIZE[self._kind], NUM_COPIED[self._kind]
        matrix = torch.full((size, size), 1.0 / size, device=self._device)
        numbers = torch.ones(copied, device=self._device)
        return matrix, torch.empty_like(matrix), numbers, torch.empty_like(numbers)

    def _work(self) -> None:
        matrix, product, numbers, copy = self._tensors
        for _ in range(NUM_REPEATS[self._kind]):
            torch.mm(matrix, matrix, out=product)
            copy.copy_(numbers)

    def _wait(self) -> None:
        if self._kind == "cuda":
            torch.cuda.synchronize(self._device)


@contextmanager
def turn(within_s: float) -> Iterator[bool]:
    """Whether this process is the only one of its user and node inside, which it waits for so long.
    The turn is a name that the kernel takes back when its process ends."""
    name, deadline = f"\0hybridflow-probe-{os.getuid()}", time.monotonic() + within_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as claim:
        is_ours = _is_bound(claim, name)
        while not is_ours and time.monotonic() < deadline:
            time.sleep(POLL_S)
            is_ours = _is_bound(claim, name)
        yield is_ours


def _is_bound(claim: socket.socket, name: str) -> bool:
    try:
        claim.bind(name)
    except OSError:
        return False
    return True
