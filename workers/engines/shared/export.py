"""A model that is spread over ranks, written as safetensors files; for any engine, since shard maps
say what is where.

One rank collects one parameter after the other and holds one file's worth of them at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from hybridflow.resharding.shards import Box, LocalParameter
from workers.engines.shared.gather import gather_objects

MAX_FILE_BYTES = 4 * 2**30
"""Most bytes of one file; a larger parameter is a file of its own."""
INDEX_FILE = "model.safetensors.index.json"


def nothing() -> None:
    """Where there is nothing to begin with."""


def write_safetensors(
    parameters: list[LocalParameter],
    directory: Path,
    max_file_bytes: int = MAX_FILE_BYTES,
    dtype: torch.dtype = torch.float32,
    as_stored: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    begin: Callable[[], None] = nothing,
) -> None:
    """Collective over the default group: model.safetensors, or several files and their index,
    written by rank 0 in `dtype`, after `begin`.

    An error of the disk is raised on rank 0 once all ranks are through: they would wait for it.

    Parameters travel through host memory: NCCL would open a communicator for each pair of ranks that
    exchange a message, and keep its memory. `as_stored` gives parameters the names and the form of
    the files (conversion.py).
    """
    local: list[list[Box]] = []
    for parameter in parameters:
        local.append([shard.box for shard in parameter.shards])
    everywhere = gather_objects(local)
    files = _split(parameters, max_file_bytes)
    disk = Refusals()
    with disk.collected():
        begin()
    writes = dist.get_rank() == 0 and not disk.errors
    file_of: dict[str, str] = {}
    num_bytes = 0
    for number, indices in enumerate(files):
        tensors: dict[str, Tensor] = {}
        for index in indices:
            whole = _collect(parameters[index], [boxes[index] for boxes in everywhere])
            if whole is not None:
                tensors[parameters[index].name] = whole.to(dtype)
        if writes:
            file = _file_name(number, len(files))
            stored = {name: value.contiguous() for name, value in as_stored(tensors).items()}
            with disk.collected():
                save_file(stored, directory / file, metadata={"format": "pt"})
            file_of |= dict.fromkeys(stored, file)
            num_bytes += sum(value.nbytes for value in stored.values())
            writes = not disk.errors
    if writes and len(files) > 1:
        with disk.collected():
            _write_index(file_of, num_bytes, directory)
    dist.barrier()
    if disk.errors:
        raise disk.errors[0]


class Refusals:
    """Errors of the disk, raised later."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            self.errors.append(error)


def write_code(model: PreTrainedModel, config: PretrainedConfig, directory: Path) -> None:
    """The files of a class that is code of the model's own, all that they import from beside them, and
    where `config` finds it: without them nothing loads the weights."""
    if model._auto_class is not None:
        custom_object_save(model, directory, config=config)


def write_configs(
    config: PretrainedConfig, generation: GenerationConfig | None, directory: Path
) -> None:
    """config.json and generation_config.json as they came with the model. transformers loads files
    of older releases that it would not write (sampling settings beside do_sample=false, or in
    config.json): those are written without its checks."""
    try:
        config.save_pretrained(directory)
    except ValueError:
        config.to_json_file(directory / CONFIG_NAME)
    if generation is None:
        return
    try:
        generation.save_pretrained(directory)
    except ValueError:
        generation.to_json_file(directory / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


def _collect(parameter: LocalParameter, holders: list[list[Box]]) -> Tensor | None:
    """The whole parameter in rank 0's host memory, None elsewhere; every distinct box comes
    from the first rank that holds it."""
    rank = dist.get_rank()
    sources: dict[Box, int] = {}
    for holder, boxes in enumerate(holders):
        for box in boxes:
            sources.setdefault(box, holder)
    local = {shard.box: shard.tensor for shard in parameter.shards}
    if rank != 0:
        for box, source in sorted(sources.items()):
            if source == rank:
                dist.send(local[box].cpu().contiguous(), dst=0)
        return None
    whole = torch.empty(parameter.shape, dtype=parameter.dtype)
    for box, source in sorted(sources.items()):
        if source == 0:
            part = local[box]
        else:
            part = torch.empty(box.shape, dtype=parameter.dtype)
            dist.recv(part, src=source)
        whole[box.slices].copy_(part)
    return whole


def _split(parameters: list[LocalParameter], max_file_bytes: int) -> list[list[int]]:
    """Indices of the parameters of each file, in order."""
    files: list[list[int]] = [[]]
    filled = 0
    for index, parameter in enumerate(parameters):
        size = _num_bytes(parameter)
        if files[-1] and filled + size > max_file_bytes:
            files.append([])
            filled = 0
        files[-1].append(index)
        filled += size
    return files


def _write_index(file_of: dict[str, str], total_size: int, directory: Path) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": file_of}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2))


def _file_name(number: int, num_files: int) -> str:
    return (
        "model.safetensors"
        if num_files == 1
        else f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
    )


def _num_bytes(parameter: LocalParameter) -> int:
    return torch.Size(parameter.shape).numel() * parameter.dtype.itemsize
