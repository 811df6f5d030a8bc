"""The routers of a mixture of experts in training: how evenly they spread tokens, and the auxiliary
loss that makes them.

    routers = Routers(find_routers(model), layers)   # before the model is split; on every rank
    with routers.counting(device) as count:
        ...                                          # passes with MicroBatch.routing
    load = count.summed()                            # of all ranks
    with routers.balanced(load, coefficient):
        ...                                          # backward passes have the auxiliary loss
    metrics = load.metrics()

The auxiliary loss enters through the gradient of the weights, so that a pipeline stage needs no loss of
its own, and its factor is that of the whole mini-batch, so that it does not depend on the cut.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from workers.engines.model.expert_parallel import find_experts
from workers.engines.model.router import Choice, Router, Watch, find_routers
from workers.engines.model.routing import Routing

REPLAYS = "actor.router_replay is set"


@dataclass(slots=True)
class Load:
    """How many tokens each expert was chosen for, and how probable each was."""

    chosen: Tensor
    """float64 [layers, experts]: tokens that were sent to each expert."""
    probability: Tensor
    """float64 [layers, experts]: the sum over tokens of the router's probabilities."""
    tokens: Tensor
    """float64 [layers]: tokens that were routed."""
    replayed: Tensor
    """float64 [layers]: tokens that were sent where Sequences.routes says."""
    agreed: Tensor
    """float64 [layers]: those that the router would have sent to the same experts."""

    @classmethod
    def zeros(cls, layers: int, experts: int, device: torch.device) -> Load:
        return cls.split(torch.zeros(layers, 2 * experts + 3, dtype=torch.float64, device=device))

    @classmethod
    def split(cls, table: Tensor) -> Load:
        """Views of a table [layers, 2 * experts + 3]."""
        experts = (table.shape[1] - 3) // 2
        chosen, probability, rest = table.split([experts, experts, 3], 1)
        return cls(chosen, probability, *rest.unbind(1))

    def summed(self) -> Load:
        """That of all ranks; collective."""
        rest = torch.stack([self.tokens, self.replayed, self.agreed], 1)
        table = torch.cat([self.chosen, self.probability, rest], 1)
        dist.all_reduce(table)
        return Load.split(table)

    @property
    def fraction(self) -> Tensor:
        """float64 [layers, experts]: f, each expert's share of the choices; 1 / experts if even."""
        return self.chosen / self.chosen.sum(-1, keepdim=True).clamp(min=1)

    def loss(self, coefficient: float) -> float:
        """The auxiliary loss: the sum over layers of coefficient * experts * sum_i f_i P_i, where P
        is the mean probability (Switch Transformers, equation 4, with f of all chosen experts)."""
        tokens = self.tokens[:, None].clamp(min=1)
        experts = self.chosen.shape[-1]
        return float((self.fraction * self.probability / tokens).sum() * coefficient * experts)

    def replay_metrics(self) -> dict[str, float]:
        """The share of tokens whose routes were replayed (the others have none), and the share of
        those that the routers would have sent to the same experts; over all layers."""
        replayed, tokens = self.replayed.sum(), self.tokens.sum()
        return as_floats(
            {
                "router/replayed": replayed / tokens.clamp(min=1),
                "router/agreement": self.agreed.sum() / replayed.clamp(min=1),
            }
        )

    def metrics(self) -> dict[str, float]:
        """Numbers of how even the load is, by layer: their mean, and the worst layer's."""
        fraction = self.fraction
        experts = fraction.shape[-1]
        imbalance = fraction.max(-1).values * experts
        entropy = torch.ones_like(imbalance)
        if experts > 1:
            entropy = torch.special.entr(fraction).sum(-1) / math.log(experts)
        return as_floats(
            {
                "router/imbalance": imbalance.mean(),
                "router/imbalance_max": imbalance.max(),
                "router/load_entropy": entropy.mean(),
                "router/load_entropy_min": entropy.min(),
                "router/dead_experts": (self.chosen == 0).double().mean(),
            }
        )


def as_floats(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """The same numbers on the host, which waits once for all of them."""
    return dict(zip(numbers, torch.stack(list(numbers.values())).cpu().tolist(), strict=True))


class Routers:
    """The routers of a model in the order of its layers; none where it has no experts.

    len(routers) is the number of layers with experts in the whole model, of which a pipeline stage
    runs some.
    """

    def __init__(self, routers: Mapping[str, Router], layers: Sequence[nn.Module]) -> None:
        """`layers`: the decoder layers, whose keyword arguments have the Routing."""
        self.names = list(routers)
        self.num_experts = 0
        self._count: Load | None = None
        self._records = False
        self._factors: Tensor | None = None
        """float32 [layers, experts]: the auxiliary loss of a token is factors @ probabilities."""
        self._routing: Routing | None = None
        """That of the decoder layer that runs."""
        for index, router in enumerate(routers.values()):
            self.num_experts = max(self.num_experts, router.num_experts)
            router.module.forward = self._observed(index, router)  # type: ignore[method-assign]
        for layer in layers:
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)

    def __len__(self) -> int:
        return len(self.names)

    @contextmanager
    def counting(self, device: torch.device) -> Iterator[Load]:
        """Yields what the passes within, recomputation aside, add up to on this rank."""
        self._count = count = Load.zeros(len(self), self.num_experts, device)
        try:
            yield count
        finally:
            self._count = None

    @contextmanager
    def balanced(self, load: Load, coefficient: float, scale: float = 1.0) -> Iterator[None]:
        """Within, backward passes have the gradient of `scale` times the auxiliary loss, where
        `load` is that of the whole mini-batch over all ranks."""
        tokens = load.tokens[:, None].clamp(min=1)
        factors = load.fraction * self.num_experts * coefficient * scale / tokens
        self._factors = factors.float()
        try:
            yield
        finally:
            self._factors = None

    @contextmanager
    def recording(self, records: bool = True) -> Iterator[None]:
        """Within, passes leave the experts of every token in Routing.chosen."""
        before, self._records = self._records, records
        try:
            yield
        finally:
            self._records = before

    def _enter(self, _layer: nn.Module, _arguments: Any, keywords: dict[str, Any]) -> None:
        self._routing = keywords.get("routing")

    def _observed(self, index: int, router: Router) -> Callable[..., Any]:
        plain = router.module.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            routing = self._routing
            if routing is None:
                return plain(*arguments, **keywords)
            routes = None if routing.routes is None else routing.routes[:, index].long()
            choice = router.choose(plain, arguments, keywords, routes, self.names[index])
            if self._records:
                routing.chosen[index] = choice.experts.detach().to(torch.int16)
            return choice.with_weights(self._passed(index, router, choice))

        return forward

    def _passed(self, index: int, router: Router, choice: Choice) -> Tensor:
        """The weights, with the auxiliary loss in their gradient."""
        routing, count = self._routing, self._count
        assert routing is not None
        logits, experts = choice.logits, choice.experts
        row_counts = routing.row_counts.to(logits.device)
        assert len(row_counts) == len(logits), "the router has other tokens than the micro-batch"
        if count is not None and index not in routing.seen:
            routing.seen.add(index)
            # Nothing here may be saved for the backward pass: recomputation leaves it out.
            with torch.no_grad():
                each = row_counts[:, None].expand(experts.shape).reshape(-1)
                count.tokens[index] += row_counts.sum()
                count.chosen[index].index_add_(0, experts.reshape(-1), each)
                count.probability[index] += row_counts @ router.probabilities(logits).double()
                if choice.native is not None and routing.routes is not None:
                    replayed = routing.routes[:, index, 0] >= 0
                    same = (choice.native.sort(-1).values == experts.sort(-1).values).all(-1)
                    count.replayed[index] += row_counts @ replayed.double()
                    count.agreed[index] += row_counts @ (replayed & same).double()
        if self._factors is None:
            return choice.weights
        loss = row_counts.float() @ (router.probabilities(logits) @ self._factors[index])
        attached: Tensor = _WithLoss.apply(choice.weights, loss)
        return attached


class _WithLoss(torch.autograd.Function):
    """Passes a tensor on, and differentiates a loss beside it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, torch.ones((), device=gradient.device)


def check_routers(config: PretrainedConfig, coefficient: float) -> None:
    """ValueError for an auxiliary loss that the model can't have; needs no weights."""
    if not coefficient:
        return
    name = f"train.router_aux_loss_coefficient is {coefficient}"
    if not 0 < coefficient < math.inf:
        raise ValueError(f"{name}; use a finite number over 0, or 0 to leave the loss out")
    check_declared(config, name)


def check_declared(config: PretrainedConfig, setting: str) -> None:
    """ValueError, which begins with `setting`, for a model without routers; needs no weights."""
    with torch.device("meta"):
        routers = find_routers(AutoModel.from_config(copy.deepcopy(config)))
    if not routers:
        raise ValueError(
            f"{setting}, but {config.model_type} has no routers that transformers declares; leave it "
            "out"
        )


def check_replays(config: PretrainedConfig, setting: str) -> None:
    """ValueError, which begins with `setting`, for a model whose routers can't be given routes; needs no
    weights."""
    check_declared(config, setting)
    with torch.device("meta"), torch.no_grad():
        model = AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
        for experts in find_experts(model).values():
            experts.forward = lambda hidden, *_: torch.zeros_like(hidden)  # type: ignore[method-assign]
        for name, router in find_routers(model).items():
            routes = torch.zeros(1, experts_per_token(config), dtype=torch.int64)
            watch = Watch(router.num_experts, routes)
            # Some are given a bias by the block that has them, if that is not the layer.
            block = model.get_submodule(name.rpartition(".")[0])
            tokens = torch.zeros(1, router.hidden_size)
            with watch:
                if isinstance(block, GradientCheckpointingLayer):
                    router.module(tokens)
                else:
                    block(tokens[None])
            watch.checked(name)


def experts_per_token(config: PretrainedConfig) -> int:
    """How many experts a token goes to in each layer that has them."""
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None)
    numbers = (
        set(chosen) if isinstance(chosen, list) else {chosen}
    )  # Hunyuan's may have one a layer
    (number, *others) = numbers
    if others or number is None:
        raise ValueError(
            f"{config.model_type}: layers send a token to {chosen} experts; routes are recorded of models "
            "whose layers choose equally many"
        )
    return int(number)
