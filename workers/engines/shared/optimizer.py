"""AdamW, its learning-rate schedule, and the global gradient norm over any mix of plain and
distributed tensors.

The schedule is a pure function of the step, so a checkpoint needs only the step. Per-layer learning
rates are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import cos, isfinite, pi

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from hybridflow.errors import NotFiniteError
from workers.config import LearningRateSchedule, OptimizerConfig

MODEL = "model"
"""Beginning of the names of weights in a snapshot."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, beside the step; beginnings of its names in a snapshot."""
RUN = 1024
"""Elements whose squares are added in float32."""


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, fused: bool = True
) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019) over `parameters`; matrices decay, vectors (norms, biases)
    do not.

    fused=False loops over the parameters one by one: the only way that accepts distributed tensors
    of several meshes.
    """
    matrices, vectors = [], []
    for parameter in parameters:
        if parameter.ndim >= 2:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    return adamw(matrices, vectors, config, fused=fused)


def no_moments(weights: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor before its first step."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=weights.device)}
    for moment in MOMENTS:
        state[moment] = torch.zeros_like(weights, requires_grad=False)
    return state


def adamw(
    decaying: list[nn.Parameter],
    others: list[nn.Parameter],
    config: OptimizerConfig,
    *,
    fused: bool,
) -> AdamW:
    """AdamW with weight decay for `decaying` alone; without a group that would be empty."""
    check_optimizer_config(config)
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=fused,
        foreach=False,
    )


def check_optimizer_config(config: OptimizerConfig) -> None:
    """ValueError for values that mean nothing, and for a schedule that cannot be followed."""
    for name in (
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "clip_grad_norm",
        "max_nonfinite",
    ):
        if vars(config)[name] < 0:
            meaning = " (0: no clipping)" if name == "clip_grad_norm" else ""
            raise ValueError(f"optimizer.{name} is {vars(config)[name]}; use 0 or more{meaning}")
    for name, value in (("beta1", config.beta1), ("beta2", config.beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"optimizer.{name} is {value}; choose 0 <= {name} < 1")
    if config.epsilon <= 0:
        raise ValueError(f"optimizer.epsilon is {config.epsilon}; use more than 0")
    if not 0 <= config.min_learning_rate_fraction <= 1:
        raise ValueError(
            f"optimizer.min_learning_rate_fraction is {config.min_learning_rate_fraction}; choose 0 to 1"
        )
    if (
        config.schedule is not LearningRateSchedule.constant
        and config.total_steps <= config.warmup_steps
    ):
        raise ValueError(
            f"optimizer.total_steps is {config.total_steps} with schedule {config.schedule.value} "
            f"and warmup_steps {config.warmup_steps}; set total_steps to the number of optimizer "
            "steps of the run, above warmup_steps"
        )


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up, then the schedule
    down to the minimum fraction."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule is LearningRateSchedule.constant:
        return config.learning_rate
    done = min(1.0, (step - config.warmup_steps) / (config.total_steps - config.warmup_steps))
    left = (
        1.0 - done
        if config.schedule is LearningRateSchedule.linear
        else 0.5 * (1.0 + cos(pi * done))
    )
    floor = config.min_learning_rate_fraction
    return config.learning_rate * (floor + (1.0 - floor) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The learning rate of the next step, for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """This rank's gradient tensors, in order, without those that are None or empty."""
    local = []
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.to_local()
        if gradient is not None and gradient.numel():
            local.append(gradient)
    return local


def global_grad_norm(
    gradients: Iterable[tuple[Tensor, int]], *, world_size: int, device: torch.device
) -> Tensor:
    """L2 norm (float64, on the CPU) of the gradient of all parameters of all ranks of the default
    group; one all-reduce of a number.

    `gradients`: what this rank holds, each with the number of ranks that hold the same elements;
    its squares are divided by it. `device`: of all ranks, which may hold no gradient.
    """
    squares: dict[int, list[Tensor]] = {}
    for gradient, copies in gradients:
        squares.setdefault(copies, []).append(gradient)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for copies, tensors in squares.items():
        total += torch.stack([sum_of_squares(tensor) for tensor in tensors]).sum() / copies
    if world_size > 1:
        dist.all_reduce(total)
    return total.sqrt().cpu()


def sum_of_squares(tensor: Tensor) -> Tensor:
    """The squares of a float32 tensor of any size, added up to a float64 scalar: in float32 over
    short runs only, whose sums are added in float64.

    One float32 sum over a buffer of millions of elements is off by 1e-4 and more.
    """
    flat = tensor.reshape(-1)
    whole = len(flat) // RUN * RUN
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, RUN), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return runs.double().square().sum() + rest.double().square()


def clip_gradients(parameters: Mapping[str, nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale the gradients of `parameters` as `clip` does."""

    def broken() -> list[str]:
        return [name for name, parameter in parameters.items() if not _is_finite(parameter)]

    clip(local_gradients(parameters.values()), float(norm), limit, broken)


def clip(
    gradients: list[Tensor], norm: float, limit: float, broken: Callable[[], list[str]]
) -> None:
    """Scale `gradients`, whose global norm is `norm`, so that it is at most `limit` (0: leave
    them).

    A NotFiniteError for a norm that is not finite; it names the parameters of this rank that `broken`
    lists. The weights have not been touched.
    """
    if not isfinite(norm):
        names = broken()
        where = ", ".join(names[:5]) or "parameters of other ranks"
        if len(names) > 5:
            where += f" and {len(names) - 5} more"
        raise NotFiniteError(
            f"grad_norm is {norm}: the gradient is not finite in {where}; the weights were not "
            "changed"
        )
    if 0 < limit < norm and gradients:
        torch._foreach_mul_(gradients, limit / (norm + 1e-6))


def _is_finite(parameter: nn.Parameter) -> bool:
    return all(bool(torch.isfinite(gradient).all()) for gradient in local_gradients([parameter]))
