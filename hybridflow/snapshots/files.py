"""A rank's file of a snapshot: boxes of named float32 tensors, and a digest of each.

The file is in the safetensors format. Its header says which box of which tensor each entry is, so
that a file can be read without the others and on any layout:

    {"model.embed_tokens.weight": {"dtype": "F32", "shape": [64, 192], "data_offsets": [0, 49152]},
     "__metadata__": {"format": "hybridflow-snapshot-1", "stamp": "2.17", "scalars": "{...}",
                      "boxes": "[[name, start, shape of the whole tensor], ...]",
                      "digests": "16 hexadecimal digits an entry", "checksum": "of the header"}}

The header is written last: a file whose writer died has none. Writing is no collective, so a dead
peer cannot hang it. Elements that several ranks hold are written by one of them; which one, the
caller knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybridflow.resharding.digest import BoxDigest, Scratch, block_words
from hybridflow.resharding.shards import Box, LocalParameter, LocalShard

FORMAT = "hybridflow-snapshot-1"
SUFFIX = ".safetensors"
DIGEST_DIGITS = 16
"""Hexadecimal digits of a digest."""
LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""
ITEM_BYTES = 4
NO_CHECKSUM = "0" * 16
HEADER_STEP = 512
"""Headers are a multiple of so many bytes, so that a file's size does not change with a number's
digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A rank's answer to a save."""

    names: tuple[str, ...]
    """The tensors, in an order that is the same on every rank; empty on ranks after the first,
    whose answers would repeat it."""
    digests: NDArray[np.uint64]
    """[tensors], the digest of what this rank wrote of each; the sum over the ranks modulo 2^64 is
    the tensor's, whatever the layout."""
    num_bytes: int
    error: str = ""
    """Why nothing was written; empty where all is well."""

    @classmethod
    def failed(cls, error: str) -> Written:
        return cls(names=(), digests=np.zeros(0, dtype=np.uint64), num_bytes=0, error=error)

    @classmethod
    def total(cls, of_ranks: Sequence[Written]) -> Written:
        """All ranks' answers together; the first error where there is one."""
        for written in of_ranks:
            if written.error:
                return written
        digests = np.zeros_like(of_ranks[0].digests)
        for written in of_ranks:
            digests += written.digests  # modulo 2^64
        num_bytes = sum(written.num_bytes for written in of_ranks)
        return cls(names=of_ranks[0].names, digests=digests, num_bytes=num_bytes)


def file_name(rank: int) -> str:
    return f"{rank}{SUFFIX}"


def rank_files(directory: Path) -> list[Path]:
    """The ranks' files in a directory; what people put beside them is not read."""
    return sorted(path for path in directory.glob(f"*{SUFFIX}") if path.stem.isdecimal())


class Layout:
    """Where everything is in a rank's file; the same one from step to step, while the boxes are."""

    def __init__(self, tensors: Sequence[LocalParameter]) -> None:
        self.boxes = boxes_of(tensors)
        self.spans: list[tuple[int, int]] = []
        """The first byte of each box behind the header, and the one after its last."""
        entries: dict[str, Any] = {}
        described = []
        end = 0
        for parameter, shard, number in _numbered(tensors):
            begin, end = end, end + shard.box.numel * ITEM_BYTES
            self.spans.append((begin, end))
            name = f"{parameter.name}#{number}" if number else parameter.name
            entries[name] = {
                "dtype": "F32",
                "shape": list(shard.box.shape),
                "data_offsets": [begin, end],
            }
            described.append([parameter.name, list(shard.box.start), list(parameter.shape)])
        self.num_bytes = end
        self._entries = json.dumps(entries)
        self._described = json.dumps(described)

    def header(self, scalars: str, stamp: str, digests: Sequence[int]) -> bytes:
        """The header with its length, a multiple of HEADER_STEP bytes, whatever the digests are."""
        metadata = {
            "format": FORMAT,
            "stamp": stamp,
            "scalars": scalars,
            "boxes": self._described,
            "digests": "".join([f"{number:0{DIGEST_DIGITS}x}" for number in digests]),
            "checksum": NO_CHECKSUM,
        }
        metadata["checksum"] = _digest_of(f"[{json.dumps(metadata)}, {self._entries}]")
        further = self._entries[1:-1]
        separator = ", " if further else ""
        text = f'{{"__metadata__": {json.dumps(metadata)}{separator}{further}}}'.encode()
        text += b" " * (-(LENGTH_BYTES + len(text)) % HEADER_STEP)
        return len(text).to_bytes(LENGTH_BYTES, "little") + text


class Bound:
    """A file's memory, cut into its boxes: a buffer that is written again and again."""

    def __init__(self, buffer: Tensor, layout: Layout, header_bytes: int) -> None:
        """`buffer`: uint8 [bytes of the file or more]."""
        self.layout, self.header_bytes = layout, header_bytes
        self.places: list[Tensor] = []
        """float32, one of each box's shape."""
        self._digests: list[BoxDigest] = []
        scratch: dict[torch.device, Scratch] = {}
        for (begin, end), (_, whole, box) in zip(layout.spans, layout.boxes, strict=True):
            memory = buffer[header_bytes + begin : header_bytes + end].view(torch.float32)
            place = memory.view(box.shape)
            self.places.append(place)
            if box.numel:
                self._digests.append(box_digest(whole, box, place, scratch))

    def digests(self) -> list[int]:
        """One for each box, of what the memory holds now."""
        sums = iter(_as_numbers([digest() for digest in self._digests]))
        numbers = []
        for _, _, box in self.layout.boxes:
            numbers.append(next(sums) if box.numel else 0)
        return numbers


class Contents:
    """A rank's file before it is written.

    contents = Contents(engine.state(moments=True, copies=False), {"num_steps": 7}, stamp="2.17")
    with path.open("wb") as file:
        contents.write(file)
    """

    def __init__(
        self,
        tensors: Sequence[LocalParameter],
        scalars: Mapping[str, int],
        stamp: str = "",
        layout: Layout | None = None,
    ) -> None:
        """`tensors`: every tensor on every rank, in the same order, with this rank's shards.
        `stamp`: the same in all files of one snapshot, another one in every other snapshot.
        `layout`: that of these tensors, where the caller has it."""
        self.tensors = tensors
        self.layout = layout or Layout(tensors)
        self._scalars, self._stamp = json.dumps(dict(scalars)), stamp
        # The digests' places, so that the header's length is known before they are.
        self.header_bytes = len(self._header([0] * len(self.layout.spans)))
        self.num_bytes = self.header_bytes + self.layout.num_bytes

    @property
    def on_gpu(self) -> bool:
        """Whether any of it is in a GPU's memory."""
        return any(shard.tensor.is_cuda for _, shard, _ in _numbered(self.tensors))

    def digests(self) -> list[int]:
        """One for each box, in the order of the entries; of what the memory holds now."""
        scratch: dict[torch.device, Scratch] = {}
        sums: list[Tensor] = []
        for parameter, shard, _ in _numbered(self.tensors):
            sums.append(digest(parameter.shape, shard.box, shard.tensor, scratch))
        return _as_numbers(sums)

    def write(self, file: BinaryIO) -> NDArray[np.uint64]:
        """Writes into an empty file, the header last; returns the digests of the tensors
        (Written.digests)."""
        digests = self.digests()
        file.seek(self.header_bytes)
        for _, shard, _ in _numbered(self.tensors):
            values = shard.tensor.detach().cpu().contiguous().numpy()
            file.write(values.reshape(-1).view(np.uint8).data)
        file.seek(0)
        file.write(self._header(digests))
        return self._per_tensor(digests)

    def copy_to(self, buffer: Tensor, bound: Bound | None = None) -> NDArray[np.uint64]:
        """As `write`, into memory: uint8 [num_bytes or more]. `bound`: that of the buffer, where the
        caller has one of this layout and header."""
        buffer[:LENGTH_BYTES].zero_()
        bound = bound or Bound(buffer, self.layout, self.header_bytes)
        sources = [shard.tensor for _, shard, _ in _numbered(self.tensors)]
        if sources:  # a rank whose every element an earlier one writes has none
            with torch.no_grad():
                torch._foreach_copy_(bound.places, sources, non_blocking=True)
        # A GPU reads its own memory faster than the host reads the copy. Reading the digests waits
        # for the copies before them.
        digests = self.digests() if self.on_gpu else bound.digests()
        header = self._header(digests)
        rest = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        buffer[LENGTH_BYTES : len(header)].copy_(rest[LENGTH_BYTES:])
        buffer[:LENGTH_BYTES].copy_(rest[:LENGTH_BYTES])
        return self._per_tensor(digests)

    def _per_tensor(self, digests: Sequence[int]) -> NDArray[np.uint64]:
        of_box = iter(digests)
        totals = []
        for parameter in self.tensors:
            total = sum([next(of_box) for _ in parameter.shards])
            totals.append(total % 2**64)
        return np.array(totals, dtype=np.uint64)

    def _header(self, digests: Sequence[int]) -> bytes:
        return self.layout.header(self._scalars, self._stamp, digests)


def write_snapshot(
    path: Path, tensors: Sequence[LocalParameter], scalars: Mapping[str, int], stamp: str = ""
) -> NDArray[np.uint64]:
    """Writes a rank's file; see Contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        return Contents(tensors, scalars, stamp).write(file)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredBox:
    """One entry of a file."""

    name: str
    """The tensor's."""
    whole: tuple[int, ...]
    """The tensor's shape."""
    box: Box
    digest: int
    begin: int
    """Its first byte in the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file's header."""

    path: Path
    stamp: str
    scalars: dict[str, int]
    boxes: tuple[StoredBox, ...]

    def tensor(self, stored: StoredBox, memory: Tensor) -> Tensor:
        """float32 [the box's shape], a view of `memory`, which is `mapped`."""
        end = stored.begin + stored.box.numel * ITEM_BYTES
        return memory[stored.begin : end].view(torch.float32).view(stored.box.shape)

    def mapped(self) -> Tensor:
        """The whole file, read only as its parts are touched: uint8 [bytes]."""
        return torch.from_file(
            str(self.path), shared=False, size=self.path.stat().st_size, dtype=torch.uint8
        )

    def check(self) -> None:
        """A ValueError that names the file and the tensor where contents and digests differ."""
        memory = self.mapped()
        scratch: dict[torch.device, Scratch] = {}
        for stored in self.boxes:
            found = digest(stored.whole, stored.box, self.tensor(stored, memory), scratch)
            if _as_numbers([found]) != [stored.digest]:
                raise ValueError(
                    f"snapshot {self.path}: {stored.name} is corrupt, its digest differs from "
                    "the header's"
                )


def read_header(path: Path) -> StoredFile:
    """A ValueError that names the file where it is incomplete, corrupt, or of another format."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if not 0 < length <= size - LENGTH_BYTES:
            raise ValueError(f"snapshot {path}: has no header; its writer did not finish")
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"snapshot {path}: its header is corrupt ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"snapshot {path}: not of the format {FORMAT}; it was written by an earlier version "
            "and cannot be resumed: start a new run from its huggingface directory"
        )
    without = json.dumps([metadata | {"checksum": NO_CHECKSUM}, entries])
    if metadata["checksum"] != _digest_of(without):
        raise ValueError(f"snapshot {path}: its header is corrupt, its checksum differs")
    boxes = []
    digits = metadata["digests"]
    described = zip(json.loads(metadata["boxes"]), entries.values(), strict=True)
    for number, ((name, start, whole), entry) in enumerate(described):
        begin, end = entry["data_offsets"]
        if LENGTH_BYTES + length + end > size:
            raise ValueError(f"snapshot {path}: is cut off in {name}")
        at = number * DIGEST_DIGITS
        boxes.append(
            StoredBox(
                name=name,
                whole=tuple(whole),
                box=Box(tuple(start), tuple(entry["shape"])),
                digest=int(digits[at : at + DIGEST_DIGITS], 16),
                begin=LENGTH_BYTES + length + begin,
            )
        )
    return StoredFile(
        path=path,
        stamp=metadata["stamp"],
        scalars=json.loads(metadata["scalars"]),
        boxes=tuple(boxes),
    )


def check_file(path: Path) -> None:
    """A ValueError that says what is wrong with the file."""
    read_header(path).check()


def digest(
    whole: tuple[int, ...], box: Box, tensor: Tensor, scratch: dict[torch.device, Scratch]
) -> Tensor:
    """int64 [], of a float32 box of a tensor of shape `whole`; that of a union of disjoint boxes
    is the sum. It depends on the tensor's shape and contents, not on the layout."""
    if not tensor.numel():
        return torch.zeros((), dtype=torch.int64)
    return box_digest(whole, box, tensor, scratch)()


def box_digest(
    whole: tuple[int, ...], box: Box, tensor: Tensor, scratch: dict[torch.device, Scratch]
) -> BoxDigest:
    """`digest` of a box that is not empty, bound to its memory."""
    if tensor.device not in scratch:
        scratch[tensor.device] = Scratch(tensor.device)
    words = -(-prod(whole[-1:]) * ITEM_BYTES // 8)
    return BoxDigest(
        tensor, box.start, whole, torch.float32, block_words(words), scratch[tensor.device]
    )


def boxes_of(tensors: Sequence[LocalParameter]) -> list[tuple[str, tuple[int, ...], Box]]:
    """Name, shape of the whole tensor, and box of everything that this rank holds."""
    boxes = []
    for parameter, shard, _ in _numbered(tensors):
        boxes.append((parameter.name, parameter.shape, shard.box))
    return boxes


def _numbered(
    tensors: Sequence[LocalParameter],
) -> Iterator[tuple[LocalParameter, LocalShard, int]]:
    """Every box with its number among those of its tensor."""
    for parameter in tensors:
        for number, shard in enumerate(parameter.shards):
            yield parameter, shard, number


def _as_numbers(sums: Sequence[Tensor]) -> list[int]:
    """int64 sums as they are modulo 2^64; one transfer for those of an accelerator, whose moments may be
    on the host."""
    numbers = np.zeros(len(sums), dtype=np.uint64)
    for device in {total.device for total in sums}:
        places = [place for place, total in enumerate(sums) if total.device == device]
        together = torch.stack([sums[place] for place in places])
        numbers[places] = together.cpu().numpy().view(np.uint64)
    return [int(number) for number in numbers]


def _digest_of(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
