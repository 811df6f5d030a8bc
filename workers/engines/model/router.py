"""A router of a mixture of experts, whatever its family: which experts it chose for each token, and how
probable it found them.

    for name, router in find_routers(model).items():
        choice = router.choose(router.module.forward, arguments, keywords, routes)
        choice.experts, router.probabilities(choice.logits)

transformers declares a family's class of routers and which of the outputs are the logits. The others
are weights and experts of every token, in either order, or the weights of all experts (Llama 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

LOGITS = "router_logits"
"""transformers' name for the output of routers that it records."""
SOFTMAXES = (torch.softmax, Tensor.softmax, F.softmax)
SIGMOIDS = (torch.sigmoid, Tensor.sigmoid, F.sigmoid)


class Scores(Enum):
    """How a router makes scores of its logits."""

    softmax = auto()
    sigmoid = auto()
    given = auto()
    """Its logits are the scores already (Gemma 4)."""


@dataclass(slots=True)
class Choice:
    """A router's outputs for the tokens of a micro-batch."""

    outputs: list[Tensor]
    logits: Tensor
    """[tokens, experts]."""
    weights: Tensor
    """[tokens, experts per token], or [tokens, experts]: factors of the experts' outputs."""
    experts: Tensor
    """int64 [tokens, experts per token]."""
    native: Tensor | None
    """The experts that the router would have chosen, where it was given others."""

    def with_weights(self, weights: Tensor) -> tuple[Tensor, ...]:
        """The outputs with other weights."""
        place = next(at for at, output in enumerate(self.outputs) if output is self.weights)
        return (*self.outputs[:place], weights, *self.outputs[place + 1 :])


class Router:
    """One router: Router(module, matrix, logits_at=0)"""

    def __init__(self, module: nn.Module, matrix: Tensor, logits_at: int) -> None:
        """`matrix`: the router's parameter [experts, hidden]; `logits_at`: the place of the logits among
        the outputs."""
        self.module = module
        self.num_experts = int(matrix.shape[0])
        self.hidden_size = int(matrix.shape[1])
        self._logits_at = logits_at
        self._scores: Scores | None = None
        """None before the first pass, which shows it."""
        self._weighs_all = False
        """Whether the weights are those of all experts, so that its choice has to be watched."""

    def choose(
        self,
        plain: Callable[..., Any],
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        routes: Tensor | None,
        name: str,
    ) -> Choice:
        """Runs the router, which sends tokens where `routes` says (int64 [tokens, experts per token], -1
        where it decides); ValueError with its `name` if it can't be told."""
        watch = Watch(self.num_experts, routes)
        is_watched = routes is not None or self._scores is None or self._weighs_all
        with watch if is_watched else nullcontext():
            outputs = list(plain(*arguments, **keywords))
        logits = outputs[self._logits_at]
        if self._scores is None:
            self._scores, self._weighs_all = watch.scores_of(logits), len(outputs) == 2
        native = None if routes is None else watch.checked(name)
        others = [output for output in outputs if output is not logits]
        if self._weighs_all:
            (weights,), experts = others, watch.chosen(name)
        else:
            weights, experts = sorted(others, key=lambda output: not output.is_floating_point())
        return Choice(outputs, logits, weights, experts, native)

    def probabilities(self, logits: Tensor) -> Tensor:
        """float32 [tokens, experts]: the scores, which add up to 1 for every token."""
        logits = logits.float()
        if self._scores is Scores.given:
            return logits
        if self._scores is Scores.sigmoid:
            scores = logits.sigmoid()
            return scores / scores.sum(-1, keepdim=True)
        return logits.softmax(-1)


class Watch(TorchFunctionMode):
    """Within, how a router scores and chooses is seen. With routes, its choice of experts is the given one,
    and its weights are its own scores of those experts, through which gradients flow.

    A router ends in topk over all experts; the choice of groups of experts before it, which has
    other sizes, has no say then.
    """

    def __init__(self, num_experts: int, routes: Tensor | None) -> None:
        """`routes`: int64 [tokens, experts per token], -1 where the router decides."""
        super().__init__()
        self._num_experts, self._routes = num_experts, routes
        self._softmaxes: list[Tensor] = []
        self._has_sigmoid = False
        self._native: Tensor | None = None
        self._chosen: Tensor | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in SOFTMAXES:
            self._softmaxes.append(result)
        self._has_sigmoid |= function in SIGMOIDS
        if function not in (torch.topk, Tensor.topk):
            return result
        scores = args[0] if args else (kwargs or {})["input"]
        if scores.shape[-1] != self._num_experts:
            return result
        if self._routes is None:
            self._native = self._chosen = result.indices
            return result
        if result.indices.shape != self._routes.shape:
            return result
        self._native = result.indices
        self._chosen = torch.where(self._routes >= 0, self._routes, result.indices)
        return torch.return_types.topk((scores.gather(-1, self._chosen), self._chosen))

    def scores_of(self, logits: Tensor) -> Scores:
        if any(logits is scores for scores in self._softmaxes):
            return Scores.given
        return Scores.sigmoid if self._has_sigmoid else Scores.softmax

    def chosen(self, name: str) -> Tensor:
        """int64 [tokens, experts per token]: where the tokens are sent."""
        self.checked(name)
        assert self._chosen is not None
        return self._chosen

    def checked(self, name: str) -> Tensor:
        """int64 [tokens, experts per token]: the router's own choice."""
        if self._native is None:
            raise ValueError(
                f"actor.router_replay: the router {name} does not choose its experts by topk over "
                f"all {self._num_experts} of them; set it to off"
            )
        return self._native


def find_routers(model: PreTrainedModel) -> dict[str, Router]:
    """The routers by name, as transformers declares them; the model may be on meta."""
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    declared = [(module._can_record_outputs or {}).get(LOGITS) for module in inner]
    recorder = next(filter(None, declared), None)
    if not isinstance(recorder, OutputRecorder) or recorder.target_class is nn.Linear:
        return {}
    hidden_size = model.config.get_text_config().hidden_size
    routers: dict[str, Router] = {}
    for name, module in model.named_modules():
        if isinstance(module, recorder.target_class):
            matrices = [p for p in module.parameters() if p.ndim == 2 and p.shape[1] == hidden_size]
            # A class with more of them has the experts too.
            if len(matrices) == 1:
                routers[name] = Router(module, matrices[0], recorder.index)
    return routers


def router_modules(model: PreTrainedModel) -> list[str]:
    """Names of the routers and of the modules within them."""
    return [
        f"{name}.{inner}".removesuffix(".")
        for name, router in find_routers(model).items()
        for inner, _ in router.module.named_modules()
    ]
