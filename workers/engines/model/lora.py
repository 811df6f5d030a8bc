"""Low-rank adapters (LoRA, Hu et al. 2021) on the linear layers of a model whose own weights are
frozen.

    adapter = attach(source, resolved, Head.lm, seed)   # before the model is split and materialized
    with adapter.switched_off():
        ...                                             # forward passes of the model as it was loaded

A layer keeps its name and class: its forward adds scale * (x A') B' to what it returned, and A and
B are two more parameters of it, NAME.lora_A and NAME.lora_B. B begins at zero, so that the first
outputs are those of the model bit for bit. Left out: dropout (the samples' log-probs would not be
those of the trainer), experts' weights, the output embedding.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.config import LoraConfig, ModelConfig
from workers.engines.base import Head
from workers.engines.model.loading import ModelSource, build_on_meta
from workers.engines.model.peft_files import SCORE_WEIGHT, PeftFiles
from workers.engines.model.tower import in_tower

LOGGER = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
LORA_A, LORA_B = "lora_A", "lora_B"
"""Names of an adapted layer's matrices: [rank, inputs] and [outputs, rank]."""
SCORE = "score"
"""The head of a critic or reward model, which is trained whole beside the adapters."""


@dataclass(kw_only=True)
class Adapter:
    """The adapter of a model in this process."""

    config: LoraConfig
    """With rank, alpha and rslora as the adapter has them."""
    layers: tuple[str, ...]
    """Names of the adapted layers, in the model's order."""
    enabled: bool = field(default=True, init=False)

    @property
    def scale(self) -> float:
        return scale(self.config)

    def added(self, hidden: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        """The term that an adapted layer adds to its output: scale * (hidden A') B'; of parts of A
        and B the part of it."""
        assert a is not None
        assert b is not None
        return self.scale * F.linear(F.linear(hidden, a), b)

    def put_on(self, shell: PreTrainedModel, head: Head) -> None:
        """Freezes another copy of the modules, on meta, and adapts its layers."""
        freeze(shell, head)
        for name in self.layers:
            layer = shell.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            for matrix, shape in matrix_shapes(layer, self.config.rank).items():
                value = nn.Parameter(torch.empty(shape, device="meta"))
                layer.register_parameter(matrix, value)
            layer.forward = _adapted(layer, self)  # type: ignore[assignment, method-assign]

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Within, forward passes leave the adapter out. For passes without gradients: what is
        recomputed in a backward pass must not find it switched."""
        assert not torch.is_grad_enabled(), "an adapter is switched off without gradients only"
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before


def scale(config: LoraConfig) -> float:
    """The factor of B A."""
    return config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


def freeze(model: PreTrainedModel, head: Head) -> None:
    """Everything but the head of a critic or reward model, before adapters are added."""
    model.requires_grad_(False)
    if head is not Head.lm:
        model.get_submodule(SCORE).requires_grad_(True)


def matrix_shapes(layer: nn.Linear, rank: int) -> dict[str, tuple[int, int]]:
    """Shapes of a layer's A and B by their names."""
    return {LORA_A: (rank, layer.in_features), LORA_B: (layer.out_features, rank)}


def attach(source: ModelSource, config: LoraConfig, head: Head, seed: int) -> Adapter:
    """Freezes the model of `source` and gives its target layers an adapter: that of config.adapter,
    or a new one drawn from `seed`. Collective only in that every rank calls it.

    A ValueError for targets that the model does not have, and for files of another model.
    """
    files = PeftFiles.read(config.adapter) if config.adapter is not None else None
    config = files.config if files is not None else config
    if files is not None:
        names = stored_layers(source.model, files, head)
    else:
        names = target_layers(source.model, config)
    freeze(source.model, head)
    adapter = Adapter(config=config, layers=names)
    stored = files.tensors if files is not None else None
    for name in names:
        layer = source.model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        for matrix, shape in matrix_shapes(layer, config.rank).items():
            if stored is not None:
                make = _stored(stored[f"{name}.{matrix}"])
            elif matrix == LORA_A:
                make = _drawn(shape, f"{seed}/{name}")
            else:
                make = _zeros(shape)
            source.add_parameter(layer, matrix, shape, make)
        layer.forward = _adapted(layer, adapter)  # type: ignore[assignment, method-assign]
    if stored is not None and SCORE_WEIGHT in stored:
        source.replace(SCORE_WEIGHT, stored[SCORE_WEIGHT].float())
    return adapter


def check_adapter(model: ModelConfig, config: LoraConfig, head: Head) -> None:
    """The ValueErrors of `attach`, from the model's configuration and the adapter's files alone."""
    shell = build_on_meta(model, head)
    if config.adapter is None:
        target_layers(shell, config)
        return
    files = PeftFiles.read(config.adapter)
    stored_layers(shell, files, head)
    if files.base and Path(files.base).resolve() != Path(model.path).resolve():
        LOGGER.warning(
            "lora.adapter is %r, which names %r as its base, and model.path is %r; they must be the "
            "same weights",
            config.adapter,
            files.base,
            model.path,
        )


def check_scores(config: LoraConfig) -> None:
    """ValueError for the adapter of a reward model that is not trained, if it brings no head."""
    if config.adapter is not None and SCORE_WEIGHT not in PeftFiles.read(config.adapter).tensors:
        raise ValueError(
            f"train.lora.adapter is {config.adapter!r}, whose files have no {SCORE_WEIGHT}, so that "
            "scores would mean nothing; give the adapter that python -m recipes.reward_model saved"
        )


def stored_layers(model: PreTrainedModel, files: PeftFiles, head: Head) -> tuple[str, ...]:
    """Names of the layers that the files adapt, in the model's order; it may be on meta.

    A ValueError for files of another model.
    """
    linear, layers = _linear_layers(model), files.config.target_modules
    directory = files.config.adapter
    for name in layers:
        if name not in linear:
            raise ValueError(
                f"lora.adapter is {directory!r}, whose files adapt {name}, which is no linear layer of "
                f"the model that can be adapted; it has such as {linear[0]}: use the adapter's own "
                "base as model.path, or merge the adapter with PEFT"
            )
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        for matrix, shape in matrix_shapes(layer, files.config.rank).items():
            stored = tuple(files.tensors[f"{name}.{matrix}"].shape)
            if stored != shape:
                raise ValueError(
                    f"lora.adapter is {directory!r}, whose {name}.{matrix} has shape {stored}, and the "
                    f"model needs {shape}; use the adapter's own base as model.path"
                )
    score = files.tensors.get(SCORE_WEIGHT)
    if score is not None and head is Head.lm:
        raise ValueError(
            f"lora.adapter is {directory!r}, the adapter of a critic or reward model: its files have "
            f"{SCORE_WEIGHT}, for which a language model has no place; give an adapter of a language "
            "model"
        )
    if score is not None and score.shape != model.get_parameter(SCORE_WEIGHT).shape:
        raise ValueError(
            f"lora.adapter is {directory!r}, whose {SCORE_WEIGHT} has shape {tuple(score.shape)}; a "
            "critic or reward model has one number a token"
        )
    return tuple(name for name in linear if name in set(layers))


def target_layers(model: PreTrainedModel, config: LoraConfig) -> tuple[str, ...]:
    """Names of the layers that `config` targets; the model may be on meta. Those of a vision tower only
    where a regular expression matches them: their names end as the decoder's do.

    A ValueError for a target that matches no linear layer lists those that the model has.
    """
    linear, targets = _linear_layers(model), config.target_modules
    by_pattern = isinstance(targets, str) and targets != ALL_LINEAR
    if not by_pattern:
        linear = [name for name in linear if not in_tower(model, name)]
    if targets == ALL_LINEAR:
        if experts := _expert_weights(model):
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(
                f"lora.target_modules is {ALL_LINEAR}, but the weights of this model's experts "
                f"({experts[0]} and others) can't be adapted; name the layers that are to be: some of "
                f"{ends}"
            )
        return tuple(linear)
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"lora.target_modules is {targets!r}, which is no regular expression ({error}); "
                f"correct it, or use {ALL_LINEAR}"
            ) from None
        chosen = {name for name in linear if pattern.fullmatch(name)}
        _check_matched(targets, chosen, linear)
        return tuple(name for name in linear if name in chosen)
    if not isinstance(targets, Sequence) or not targets:
        raise ValueError(
            f"lora.target_modules is {targets!r}; use {ALL_LINEAR}, a list of names, or a regular "
            "expression"
        )
    every: set[str] = set()
    for target in targets:
        matched = {name for name in linear if name == target or name.endswith(f".{target}")}
        _check_matched(target, matched, linear)
        every |= matched
    return tuple(name for name in linear if name in every)


def _check_matched(target: str, matched: set[str], linear: Sequence[str]) -> None:
    if matched:
        return
    ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    raise ValueError(
        f"lora.target_modules has {target!r}, which is no linear layer of the model that can be "
        f"adapted; it has {ends} (such as {linear[0]})"
    )


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Every linear layer that an adapter can be on: of the decoder, no head."""
    heads = {id(model.get_output_embeddings())}
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in heads and name != SCORE:
            names.append(name)
    if not names:
        raise ValueError(
            f"lora.rank: {type(model).__name__} has no torch.nn.Linear layer to adapt; set it to 0"
        )
    return names


def _expert_weights(model: nn.Module) -> list[str]:
    """Parameters that hold the matrices of all experts of a layer."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 3]


def _stored(value: Tensor) -> Callable[[], Tensor]:
    return value.float


def _drawn(shape: tuple[int, ...], key: str) -> Callable[[], Tensor]:
    """A uniform in +-1 / sqrt(inputs), as PEFT's: the same for a seed and a layer on every
    layout."""

    def make() -> Tensor:
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        generator = torch.Generator().manual_seed(number >> 1)
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    return make


def _zeros(shape: tuple[int, ...]) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape)


def _adapted(layer: nn.Linear, adapter: Adapter) -> Callable[[Tensor], Tensor]:
    """The layer's forward with the adapter's part added. The parameters are read at every call:
    engines exchange them."""
    forward = layer.forward

    def run(hidden: Tensor) -> Tensor:
        output = forward(hidden)
        if not adapter.enabled:
            return output
        return output + adapter.added(hidden, layer._parameters[LORA_A], layer._parameters[LORA_B])

    return run
