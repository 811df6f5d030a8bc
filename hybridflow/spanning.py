"""A process group over the hosts of two pools: data goes from host to host without passing the
controller.

Each pool has a torch.distributed world of its own. The spanning group is registered in neither: it
is passed to the functions of torch.distributed that take a group, and has ranks of its own
(group.rank(), group.size()). The controller tells both pools the address of the meeting point, and
starts calls that use the group on both sides before it waits for either.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

LOOPBACK = "127.0.0.1"
JOIN_TIMEOUT_S = 300.0
"""How long a rank waits for the others to join; the controller notices a dead rank much sooner."""


class MeetingPoint:
    """The listening socket at which the ranks of a spanning group find each other; a rank keeps it
    as long as the group exists.

    point = MeetingPoint("10.0.0.7", size=6)
    group = join(point.address, rank=0, size=6, host="10.0.0.7", device="cpu", timeout_s=600.0, point=point)
    """

    def __init__(self, host: str, *, size: int) -> None:
        self.store = dist.TCPStore(
            host,
            0,
            size,
            is_master=True,
            timeout=timedelta(seconds=JOIN_TIMEOUT_S),
            wait_for_workers=False,
        )
        self.address = f"{host}:{self.store.port}"


def join(
    address: str,
    *,
    rank: int,
    size: int,
    host: str,
    device: str,
    timeout_s: float,
    point: MeetingPoint | None = None,
) -> dist.ProcessGroup:
    """The group of all `size` ranks that join at `address`; collective over them.

    `host` is this machine's address as the others can reach it (127.0.0.1 where all are on one
    machine). Tensors in host memory travel over gloo, those of a cuda device over NCCL. An
    operation of the group fails after `timeout_s`, joining after JOIN_TIMEOUT_S.
    """
    timeout, joining = timedelta(seconds=timeout_s), timedelta(seconds=JOIN_TIMEOUT_S)
    name, _, port = address.rpartition(":")
    if point is not None:
        store = point.store
    else:
        store = dist.TCPStore(name, int(port), size, is_master=False, timeout=joining)
    kinds = dist.ProcessGroup.BackendType
    group = dist.ProcessGroup(store, rank, size)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # A pool's own world may be bound to the loopback interface; this group is bound to where the
    # other pool can reach it.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo/", store), rank, size, options)
    gloo._set_sequence_number_for_group()
    on_cuda = device.startswith("cuda")
    group._set_default_backend(kinds.NCCL if on_cuda else kinds.GLOO)
    group._register_backend(torch.device("cpu"), kinds.GLOO, gloo)
    if on_cuda:
        nccl_options = dist.ProcessGroupNCCL.Options()
        nccl_options._timeout = timeout
        nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl/", store), rank, size, nccl_options)
        nccl._set_sequence_number_for_group()
        group._register_backend(torch.device("cuda"), kinds.NCCL, nccl)
    return group
