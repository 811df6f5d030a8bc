"""Keeping vLLM's changes to transformers' classes to vLLM's own models.

For families that vLLM has no model of its own for it builds transformers' and decorates the
decoder's *class*: every decoder of that class that the process builds afterwards (a reference, a
critic, a trainer) would ask for vLLM's configuration, and those built before would be called in
vLLM's way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def own_classes(built: list[nn.Module]) -> Iterator[None]:
    """Within, vLLM may build models, which go into `built`. Afterwards transformers' classes are
    what they were, and those models are of subclasses with vLLM's decorations.

    with own_classes(built):
        built.append(initialize_model(...))
    """
    from vllm.model_executor.models.transformers.base import Base

    decorate = Base._decorate_cls_for_torch_compile
    before: dict[type[nn.Module], tuple[tuple[type, ...], dict[str, Any]]] = {}

    def remember(self: Base, cls: type[nn.Module], *args: Any, **kwargs: Any) -> None:
        before.setdefault(cls, (cls.__bases__, dict(vars(cls))))
        decorate(self, cls, *args, **kwargs)

    Base._decorate_cls_for_torch_compile = remember
    own: dict[type[nn.Module], type[nn.Module]] = {}
    try:
        yield
    finally:
        Base._decorate_cls_for_torch_compile = decorate
        for cls, (bases, attributes) in before.items():
            own[cls] = _undecorate(cls, bases, attributes)
    for model in built:
        for module in model.modules():
            if type(module) in own:
                module.__class__ = own[type(module)]


def _undecorate(
    cls: type[nn.Module], bases: tuple[type, ...], attributes: dict[str, Any]
) -> type[nn.Module]:
    """Gives `cls` its bases and attributes of before; returns a subclass with those of now."""
    decorations = {}
    for name, value in list(vars(cls).items()):
        if name not in attributes:
            delattr(cls, name)
        elif attributes[name] is not value:
            setattr(cls, name, attributes[name])
        else:
            continue
        decorations[name] = value
    added = tuple(base for base in cls.__bases__ if base not in bases)
    cls.__bases__ = bases
    return type(cls.__name__, (cls, *added), decorations | {"__module__": cls.__module__})
