"""What autograd keeps of a forward pass for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from workers.engines.model import remade
from workers.engines.model.remade import Recipes, Remade


def kept_bytes(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes of the storages, each once, weights included, and the number of recipes in place of
    tensors."""
    sizes, recipes = dict[int, int](), list[Remade]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    class Counting(Recipes):
        """Its hooks hide what they keep from the ones around them."""

        def pack(self, tensor: Tensor) -> Tensor | Remade:
            kept = super().pack(tensor)
            if isinstance(kept, Remade):
                recipes.append(kept)
                return kept
            return pack(kept)

    with monkeypatch.context() as patch, saved_tensors_hooks(pack, lambda tensor: tensor):
        patch.setattr(remade, "Recipes", Counting)
        kept = run()
    assert kept is not None
    return sum(sizes.values()), len(recipes)
