"""A rank's part under ZeRO, whatever the stage: master weights, AdamW's moments and gradients of
flat ranges of parameters.

DeepSpeed has three optimizers for it, with names of their own: stages 1 and 2; stage 1 in bfloat16;
stage 3. Their differences end here. A Fragment says which elements of which parameter lie where in
which flat buffer. DeepSpeed's own checkpoints, which can only be loaded on the same number of
ranks, are not used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workers.engines.shared.optimizer import no_moments


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """Elements begin..end-1 of a flattened parameter, in flat buffer number `group` from
    `offset` on."""

    name: str
    begin: int
    end: int
    group: int
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.end - self.begin]


class Partitions(ABC):
    """The rank's part of the optimizer; `zero` is DeepSpeed's optimizer, `adam` the torch optimizer
    inside."""

    def __init__(
        self, zero: Any, adam: torch.optim.AdamW, parameters: dict[str, nn.Parameter]
    ) -> None:
        self.zero = zero
        self.adam = adam
        self.fragments = self._fragments(parameters)

    @property
    @abstractmethod
    def masters(self) -> list[Tensor]:
        """Flat float32 weights; `.data` may be moved and overwritten."""

    @abstractmethod
    def gradients(self) -> list[list[Tensor]]:
        """The gradients of every flat buffer after a step's last backward pass: averaged over
        data ranks, in order, writable, padding included."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """After a step that cannot be finished: the next one starts from nothing."""

    @abstractmethod
    def publish(self) -> None:
        """Bring the master weights into everybody's working weights; collective."""

    @abstractmethod
    def _fragments(self, parameters: dict[str, nn.Parameter]) -> list[Fragment]: ...

    def states(self) -> list[dict[str, Tensor]]:
        """AdamW's state of every flat buffer; zeros before the first step."""
        for master in self.masters:
            if not self.adam.state[master]:
                self.adam.state[master] = no_moments(master)
        return [self.adam.state[master] for master in self.masters]


class FlatPartitions(Partitions):
    """Stages 1 and 2: each group of parameters in one flat buffer, cut into equal parts."""

    @property
    def masters(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def gradients(self) -> list[list[Tensor]]:
        return [list(self.zero.averaged_gradients[group]) for group in range(len(self.masters))]

    def drop_gradients(self) -> None:
        self.zero.zero_grad(set_to_none=True)
        self.zero._release_preflattened_grad_buffers()
        for group in range(len(self.masters)):
            self.zero.averaged_gradients[group] = self.zero.all_grad_tensors[group] = None

    def publish(self) -> None:
        self.zero.update_lp_params()

    def _fragments(self, parameters: dict[str, nn.Parameter]) -> list[Fragment]:
        fragments = []
        for name, parameter in parameters.items():
            mapping = vars(parameter).get("_hp_mapping")
            if mapping is not None:
                inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                end = inside.start + inside.numel
                fragments.append(
                    Fragment(
                        name=name,
                        begin=inside.start,
                        end=end,
                        group=mapping.param_group_index,
                        offset=flat.start,
                    )
                )
                # It would keep views of the states alive that offload moves.
                parameter._hp_mapping = None  # type: ignore[attr-defined]
        return fragments


class Bfloat16Partitions(FlatPartitions):
    """Stage 1 in bfloat16: as above; gradients are added up and reduced in float32 in full."""

    @property
    def masters(self) -> list[Tensor]:
        return list(self.zero.fp32_groups_flat_partition)

    def gradients(self) -> list[list[Tensor]]:
        return [[flat] for flat in self.zero.fp32_groups_gradient_flat_partition]

    def drop_gradients(self) -> None:
        self.zero.clear_hp_grads()
        self.zero.clear_lp_grads()


class ShardedPartitions(Partitions):
    """Stage 3: every parameter in equal ranges, one a rank."""

    @property
    def masters(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def gradients(self) -> list[list[Tensor]]:
        return [list(self.zero.averaged_gradients[group]) for group in range(len(self.masters))]

    def drop_gradients(self) -> None:
        self.zero.zero_grad(set_to_none=True)
        self.zero.averaged_gradients = {}

    def publish(self) -> None:
        self.zero._partition_all_parameters()
        for group in range(len(self.masters)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero._post_step(())

    def _fragments(self, parameters: dict[str, nn.Parameter]) -> list[Fragment]:
        fragments = []
        for name, parameter in parameters.items():
            begin, end = shard_range(parameter)
            group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
            if begin < end:
                fragments.append(
                    Fragment(name=name, begin=begin, end=end, group=group, offset=offset)
                )
        return fragments


def partitions(
    zero: Any, adam: torch.optim.AdamW, parameters: dict[str, nn.Parameter]
) -> Partitions:
    """The view of DeepSpeed's optimizer, whichever of the three it chose."""
    kinds: dict[str, type[Partitions]] = {
        "DeepSpeedZeroOptimizer": FlatPartitions,
        "BF16_Optimizer": Bfloat16Partitions,
        "DeepSpeedZeroOptimizer_Stage3": ShardedPartitions,
    }
    kind = type(zero).__name__
    if kind not in kinds:
        raise RuntimeError(
            f"deepspeed chose its optimizer {kind}; this engine knows {', '.join(kinds)}: install "
            "deepspeed 0.19.8"
        )
    return kinds[kind](zero, adam, parameters)


def shard_range(parameter: Any) -> tuple[int, int]:
    """The elements of a stage-3 parameter that this rank holds; empty for the last ranks of a
    small one."""
    size = parameter.partition_numel()
    begin = min(dist.get_rank() * size, parameter.ds_numel)
    return begin, min(begin + size, parameter.ds_numel)
