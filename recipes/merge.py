"""python -m recipes.merge ADAPTER_DIR OUT [BASE]

Writes the model that an adapter makes of its base as a Hugging Face directory, in the base's data
type: every adapted weight is W + scale * B A, computed in float32 and rounded once. ADAPTER_DIR is
what a run with train.lora saves, or what PEFT does. BASE is a directory or hub name in place of the
one that the adapter names. Tokenizer, chat template and end tokens are the adapter's where it has
them, otherwise the base's.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from recipes.errors import plain_errors
from workers.config import ModelConfig
from workers.engines.base import Head
from workers.engines.model.loading import load_pretrained, model_config, saved_dtype
from workers.engines.model.lora import LORA_A, LORA_B, scale
from workers.engines.model.peft_files import SCORE_WEIGHT, PeftFiles
from workers.quiet import quiet
from workers.tokenizer import load_tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"


def merge(adapter: str, output: str, base: str | None = None) -> None:
    """A ValueError for an adapter that does not fit the base, and for an output that exists."""
    try:
        files = PeftFiles.read(adapter)
    except ValueError as error:  # of a run, where it is a setting
        raise ValueError(str(error).removeprefix("lora.")) from None
    target = Path(output)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"output is {output!r}, which is not empty; name a new directory")
    path = base or files.base
    if not path:
        raise ValueError(
            f"adapter is {adapter!r}, which does not name its base; add BASE to the command"
        )
    revision = None if base else files.revision
    has_head = SCORE_WEIGHT in files.tensors
    head = Head.score if has_head else Head.lm
    config = ModelConfig(path=path, revision=revision, new_head=has_head)
    published = model_config(config, head)
    model = load_pretrained(config, head)
    merge_into(model, files)
    with quiet():
        model.to(saved_dtype(config, published)).save_pretrained(target)
    own_tokenizer = (Path(adapter) / TOKENIZER_CONFIG).is_file()
    tokenizer = replace(config, tokenizer=adapter if own_tokenizer else None)
    load_tokenizer(tokenizer).save_pretrained(target)
    if (Path(adapter) / GENERATION_CONFIG_NAME).is_file():
        shutil.copy(Path(adapter) / GENERATION_CONFIG_NAME, target / GENERATION_CONFIG_NAME)


@torch.no_grad()
def merge_into(model: PreTrainedModel, files: PeftFiles) -> None:
    """Adds the adapter to the weights of `model`, in place."""
    factor = scale(files.config)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    embedding = model.get_input_embeddings().weight
    for name in files.config.target_modules:
        a = files.tensors[f"{name}.{LORA_A}"].float()
        b = files.tensors[f"{name}.{LORA_B}"].float()
        shape = (b.shape[0], a.shape[1])
        if name not in layers or tuple(layers[name].weight.shape) != shape:
            raise ValueError(
                f"adapter: {name} of shape {shape} is no linear layer of {model.name_or_path!r}; "
                "add the adapter's own base to the command"
            )
        if layers[name].weight is embedding:
            raise ValueError(
                f"adapter: {name} of {model.name_or_path!r} has the weight of the input embedding, "
                "which would change with it; only an adapter without it can be merged"
            )
        layers[name].weight.addmm_(b, a, alpha=factor)
    if SCORE_WEIGHT in files.tensors:
        model.get_parameter(SCORE_WEIGHT).copy_(files.tensors[SCORE_WEIGHT])


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not 2 <= len(arguments) <= 3 or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    with plain_errors():
        merge(*arguments)
        print(f"{arguments[1]}: the merged model and its tokenizer")


if __name__ == "__main__":
    main()
