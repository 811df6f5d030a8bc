"""Each host process gets a GPU, a network interface and an environment for its kind of device.

By default Ray shows a process its own GPU only, as CUDA's device 0. A cluster whose environment has
RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES shows every process all GPUs of the node.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Sequence
from ctypes.util import find_library
from dataclasses import replace
from functools import cache
from typing import Any

from hybridflow.context import RankContext

HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of processes that compute on the CPU: Ray leaves all GPUs visible to an actor or task
that asks for none."""

DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "VLLM_BATCH_INVARIANT": "1",
}
"""Environment of GPU processes whose results repeat: cuBLAS with workspaces of its own, vLLM's kernels
whose sums do not depend on the other rows. The rest is repeat_results."""


KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""glibc's allocator in CPU hosts: a freed tensor's memory stays in the process for the next
one. By default every tensor over 32 MiB is mapped anew and its pages are cleared by the kernel,
which doubles the time of elementwise operations."""

PRELOAD = "LD_PRELOAD"
KEEP_MORE = {"TCMALLOC_RELEASE_RATE": "0", "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(1 << 62)}
"""tcmalloc's settings: the same, and no word about large tensors."""

ALLOCATOR, ALLOCATOR_BEFORE = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
"""PyTorch's names of the allocator's settings: the first one counts where both are set."""
GROWING_SEGMENTS = {ALLOCATOR: "expandable_segments:True"}
"""PyTorch's allocator in GPU hosts: memory freed by one role serves the next whatever the sizes of
its tensors. vLLM turns it off by itself inside its own pools."""

DEVICE_ENVIRONMENT: dict[str, dict[str, str]] = {
    "cpu": KEEP_FREED_MEMORY | HIDDEN,
    "cuda": GROWING_SEGMENTS,
}
"""Environment of a pool's processes by their kind of device; what the controller's environment
has for the allocator goes before."""


def device_environment(context: RankContext) -> dict[str, str]:
    """The environment of a host process, by its kind of device."""
    environment = dict(DEVICE_ENVIRONMENT[context.device])
    if context.device == "cpu":
        environment |= preloaded_allocator()
    if context.device == "cuda" and allocator_settings():
        environment[ALLOCATOR] = allocator_settings()
    return environment | DETERMINISTIC if context.deterministic else environment


@cache
def preloaded_allocator() -> dict[str, str]:
    """The environment of a CPU host whose allocator is tcmalloc, where that is installed and the
    controller's environment does not say otherwise by LD_PRELOAD.

    glibc's wastes memory: before version 2.38 an aligned block, as every tensor is, never takes the
    place of a freed one of the same size (docs/performance.md has the figures).
    """
    library = find_library("tcmalloc_minimal") or find_library("tcmalloc")
    if library is None or PRELOAD in os.environ:
        return {}
    return {PRELOAD: library} | KEEP_MORE


def repeat_results() -> None:
    """Have PyTorch's operators on GPUs give the same bits every time, in this process and for good: the
    backward pass of attention sums in a fixed order, and an operator that can't raises a RuntimeError.

    On CPUs results repeat without it.
    """
    import torch

    torch.use_deterministic_algorithms(True)
    # Nothing reads memory before it is written: filling it would only take time.
    torch._C._set_deterministic_fill_uninitialized_memory(False)


def with_device(context: RankContext) -> RankContext:
    """The context of this host process with the index of the GPU that Ray reserved for it; that of
    a CPU host unchanged."""
    if not context.device.startswith("cuda") or not context.in_ray:
        return context
    import ray

    reserved = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    index = device_index(reserved, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return replace(context, device=f"cuda:{index}", local_rank=index)


def peak_memory(device: str) -> tuple[int, int]:
    """The most bytes that this process held so far: resident on the host, and on the GPU (what the
    allocator gave out; 0 without one)."""
    on_device = 0
    if device.startswith("cuda"):
        import torch

        on_device = torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, on_device


def device_index(reserved: Sequence[str], visible: str | None) -> int:
    """CUDA's number of the one reserved GPU among the visible ones: device_index(["3"], "2,3") is 1.

    `visible`: CUDA_VISIBLE_DEVICES, None where it is not set. RuntimeError where the process does
    not have exactly one GPU, or does not see it.
    """
    if len(reserved) != 1:
        raise RuntimeError(
            f"Ray reserved GPUs {list(reserved)} for a host, not one; ask for whole GPUs "
            "(num_gpus=1)"
        )
    if visible is None:
        return int(reserved[0])
    names = [name.strip() for name in visible.split(",")]
    if reserved[0] not in names:
        raise RuntimeError(
            f"Ray reserved GPU {reserved[0]}, but CUDA_VISIBLE_DEVICES={visible!r} does not show "
            "it; leave that variable to Ray, or set it before `ray start`"
        )
    return names.index(reserved[0])


def segments_grow() -> bool:
    """Whether PyTorch's allocator of this process makes memory of segments that grow, which CUDA opens
    for no other process."""
    return "expandable_segments:true" in allocator_settings().replace(" ", "").lower()


def allocator_settings() -> str:
    """The settings of PyTorch's allocator in this process' environment."""
    return os.environ.get(ALLOCATOR) or os.environ.get(ALLOCATOR_BEFORE, "")


def requested_threads() -> int:
    """OMP_NUM_THREADS: the threads that a process of this machine shall compute with, as PyTorch
    takes it; 0 where it is not set or no number."""
    first, _, _ = os.environ.get("OMP_NUM_THREADS", "").partition(",")
    return int(first) if first.strip().isdigit() else 0


def choose_interfaces(context: RankContext, *, one_machine: bool) -> None:
    """Have gloo and NCCL connect over the interface that holds the node's address in the cluster,
    unless GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME are set.

    Gloo would bind to what the machine's own name resolves to: 127.0.1.1 on Debian and Ubuntu.
    """
    interface = interface_of(context.node)
    if one_machine:
        # The whole pool is on one machine: nothing listens on another interface.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    elif interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if interface and interface != "lo" and context.device.startswith("cuda"):
        # "=": exactly this name, not one that begins with it. A group may span other pools'
        # machines.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def interface_of(address: str) -> str:
    """Name of this machine's network interface with the IP address; "" where none has it."""
    import psutil  # which comes with Ray; a run in this process alone needs neither

    addresses: dict[str, Any] = psutil.net_if_addrs()
    for name, entries in addresses.items():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6) and (
                entry.address.partition("%")[0] == address
            ):
                return name
    return ""
