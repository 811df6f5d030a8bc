"""Whether the weights in a model's files are those that its modules ask for: names and shapes, by
transformers' own rules (prefixes, renamed and stacked parameters, tied ones).

    check_files(config, head, build_on_meta(config, head))     # from the files' headers; nothing is loaded
    has_new_head = judge(config, head, model, found)           # after loading

Leaves out names of the hub that are not in its cache, whose files are judged once they are loaded, and
directories without weights: a plan needs a config.json only.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from workers.config import ModelConfig
from workers.engines.base import Head
from workers.hub import local_directory
from workers.quiet import quiet
from workers.weight_files import BIN, SAFETENSORS, model_files

META = torch.device("meta")
SCORE = "score."
"""The beginning of the names of transformers' score heads of decoders."""
OUTPUT = ("lm_head.", "embed_out.")
"""Output embeddings, which a model that scores does not need."""
OTHER_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack")
COMPARED_ROWS = 256
"""Rows of two embeddings that are compared before anything is loaded."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of loading: Found(missing=["score.weight"])"""

    missing: list[str] = field(default_factory=list)
    """Parameters that no file has."""
    unexpected: list[str] = field(default_factory=list)
    """Entries of the files that are no parameter."""
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    """(parameter, its shape in the files, its shape in the model)."""

    @classmethod
    def of(cls, info: dict[str, Any]) -> Found:
        """`info` of from_pretrained(..., output_loading_info=True)."""
        mismatched = [
            (name, tuple(there), tuple(here)) for name, there, here in info["mismatched_keys"]
        ]
        return cls(
            missing=sorted(info["missing_keys"]),
            unexpected=sorted(info["unexpected_keys"]),
            mismatched=sorted(mismatched),
        )


def check_files(config: ModelConfig, head: Head, model: PreTrainedModel) -> None:
    """A ValueError where the files of a directory do not fit `model`, which is on meta and of no use
    afterwards."""
    directory = model_directory(config)
    stored = stored_shapes(directory, f"model.path is {config.path!r}")
    if stored is None:
        return
    judge(config, head, model, _found(model, stored))
    if head is Head.lm:
        _check_tied(config, model, directory, stored)


def judge(config: ModelConfig, head: Head, model: PreTrainedModel, found: Found) -> bool:
    """Whether the model gets a new score head. A ValueError unless every other weight comes from the
    files and every entry of the files is used: what one does not name, transformers draws at
    random, or drops."""
    missing, unexpected = found.missing, found.unexpected
    scores = head is not Head.lm
    new_head = scores and bool(missing) and all(name.startswith(SCORE) for name in missing)
    if scores:
        unexpected = [name for name in unexpected if not name.startswith(OUTPUT)]
    if new_head:
        other = [name for name in unexpected if not name.startswith(f"{model.base_model_prefix}.")]
        if not config.new_head:
            if other:
                raise ValueError(_other_head(config, head, other))
            if head is Head.score:
                raise ValueError(no_score_head(config))
        # The head is exchanged: whatever stood in its place is not needed.
        missing = []
        unexpected = [name for name in unexpected if name not in other]
    for name, there, here in found.mismatched:
        raise ValueError(_other_shape(config, head, name, there, here))
    if missing or unexpected:
        raise ValueError(
            f"model.path is {config.path!r}: the weights do not fit {type(model).__name__} (head "
            f"{head.value}): missing {missing[:5]}, unexpected {unexpected[:5]}; use a checkpoint "
            "of that architecture, or take entries that it does not read out of its files"
        )
    return new_head


def check_tied(config: ModelConfig, model: PreTrainedModel) -> None:
    """A ValueError for a loaded model whose config.json ties embeddings that its files hold apart:
    transformers would use two, every other engine one."""
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    if (
        model.config.to_dict().get("tie_word_embeddings")
        and output is not None
        and output.weight is not inputs.weight
    ):
        raise ValueError(_tied_apart(config))


def no_score_head(config: ModelConfig) -> str:
    return (
        f"model.path is {config.path!r}: a language model without a score head, whose scores "
        "would mean nothing; train one from it with python -m recipes.reward_model and give that "
        "directory"
    )


def stored_shapes(directory: Path, setting: str) -> dict[str, tuple[int, ...]] | None:
    """Entry -> shape, of the files that transformers would read; None where there are none here."""
    shapes: dict[str, tuple[int, ...]] = {}
    files = list(_files(directory))
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                names = opened.keys()
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
        else:
            entries = _entries_of(file, setting)
            shapes |= {name: tuple(tensor.shape) for name, tensor in entries.items()}
    return shapes if files else None


def _entries_of(file: Path, setting: str) -> dict[str, Tensor]:
    """Those of a file of PyTorch, read without running what a pickle may hold."""
    try:
        entries = torch.load(file, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{setting}: {file.name} is no file of weights alone, and what else it holds is not run; "
            "save the weights with save_pretrained as safetensors"
        ) from error
    if not isinstance(entries, dict) or not all(isinstance(t, Tensor) for t in entries.values()):
        raise ValueError(
            f"{setting}: {file.name} holds more than weights by name; save the model with "
            "save_pretrained as safetensors"
        )
    return entries


def model_directory(config: ModelConfig) -> Path:
    return local_directory(config.path, config.revision)


def has_files(directory: Path) -> bool:
    return any(True for _ in _files(directory))


def without_weights(config: ModelConfig) -> str:
    """That a directory, or what the hub's cache has of a name while the hub can't be asked, has no
    weights, in one line with what it has in their place; empty where it has some."""
    directory = model_directory(config)
    if not directory.is_dir() or has_files(directory):
        return ""
    others = sorted(file.name for file in directory.iterdir() if file.suffix in OTHER_FILES)
    found = f" (but {', '.join(others[:3])})" if others else ""
    if directory != Path(config.path):
        return (
            f"model.path is {config.path!r}: the hub can't be asked for its weights, and the cache "
            f"({directory}) has none{found}; download it there, or give a directory"
        )
    return (
        f"model.path is {config.path!r}: no weights in it, neither {SAFETENSORS[0]} nor {BIN[0]} nor an "
        f"index of several files{found}; give the directory of a model that save_pretrained wrote"
    )


def _files(directory: Path) -> Iterator[Path]:
    """Those with weights in them."""
    return (file for file in model_files(directory) if file.suffix != ".json")


def _found(model: PreTrainedModel, stored: dict[str, tuple[int, ...]]) -> Found:
    entries = {name: torch.empty(shape, device=META) for name, shape in stored.items()}
    settings = LoadStateDictConfig(
        device_map={"": META},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        weight_mapping=get_model_conversion_mapping(model),
    )
    with quiet():
        info, _ = convert_and_load_state_dict_in_model(
            model=model, state_dict=entries, load_config=settings, disk_offload_index=None
        )
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
    return Found.of(
        {
            "missing_keys": info.missing_keys,
            "unexpected_keys": info.unexpected_keys,
            "mismatched_keys": info.mismatched_keys,
        }
    )


def _check_tied(
    config: ModelConfig, model: PreTrainedModel, directory: Path, stored: dict[str, tuple[int, ...]]
) -> None:
    """Before loading: a few rows of both embeddings, where the files hold two."""
    if not model.all_tied_weights_keys:
        return
    pairs = [
        (output, inputs)
        for output in stored
        if output.startswith(OUTPUT) and output.endswith("weight")
        for inputs in stored
        if inputs.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))
        and "vision" not in inputs
    ]
    if len(pairs) == 1 and not _equal_rows(directory, *pairs[0]):
        raise ValueError(_tied_apart(config))


def _equal_rows(directory: Path, *names: str) -> bool:
    rows: dict[str, Tensor] = {}
    for file in _files(directory):
        if file.suffix != ".safetensors":
            return True  # both are one tensor there, or loading says so
        with safe_open(file, framework="pt") as opened:
            for name in set(names) & set(opened.keys()):
                entry = opened.get_slice(name)
                step = max(1, entry.get_shape()[0] // COMPARED_ROWS)
                rows[name] = entry[::step] if step == 1 else _every(entry, step)
    first, other = (rows[name] for name in names)
    return torch.equal(first, other)


def _every(entry: Any, step: int) -> Tensor:
    return torch.cat([entry[row : row + 1] for row in range(0, entry.get_shape()[0], step)])


def _other_head(config: ModelConfig, head: Head, names: list[str]) -> str:
    what = "score" if head is Head.score else "value"
    heads = [name for name in names if name.endswith("weight")] or names
    return (
        f"model.path is {config.path!r}: its {what} head is stored as {', '.join(names[:3])}, which "
        f"transformers does not read; store it as score.weight [1, hidden] (a bias adds the same to "
        f"every score, and is left out), or set model.new_head=true to replace {heads[0]} by a new one"
    )


def _other_shape(
    config: ModelConfig, head: Head, name: str, there: tuple[int, ...], here: tuple[int, ...]
) -> str:
    if head is not Head.lm and name.startswith(SCORE):
        return (
            f"model.path is {config.path!r}: its head gives {there[0]} numbers ({name} is "
            f"{list(there)}), and a score is one; use a model with num_labels=1, or a reward.function "
            "that says what its labels are worth"
        )
    return (
        f"model.path is {config.path!r}: {name} is {list(there)} in its files and {list(here)} by its "
        "config.json; use the config.json that belongs to the weights"
    )


def _tied_apart(config: ModelConfig) -> str:
    return (
        f"model.path is {config.path!r}: config.json has tie_word_embeddings=true, and its files hold an "
        "output embedding that differs from the input's; set tie_word_embeddings=false in config.json, "
        "or remove the entry that is not meant"
    )
