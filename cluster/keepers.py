"""Keepers: a small process on every node that hands the snapshots of its memory to other nodes.

    keepers = Keepers()
    keepers.copy(directory, keep)               # begins: every node's files, in the memory of the next
    keepers.fetch(directory, nodes)             # what these nodes lack of it, from whichever node has it
    keepers.bring(directory, target, 20.0)      # all of it, into a directory that all nodes see
    keepers.leaving()                           # nodes that Ray was told to drain

They work while the hosts compute, and serve their node until it is gone: Ray starts no task on a node
that it drains. A copy is one round of the ring; a round that is under way is not waited for, so the
peers may be some steps behind. Files travel in pieces, so that Ray's object store holds few of them.
The nodes' memory is one directory here: every node finds it under the same path.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray._private.state import state
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hybridflow.snapshots.memory import make_private, shortage

LOGGER = logging.getLogger(__name__)
PIECE_BYTES = 32 << 20
FETCH_S = 300.0
"""How long a node may take to get what it lacks of a snapshot."""
FREE_S = 10.0
LOOK_S = 1.0
"""How often Ray is asked which nodes are drained."""
COPIES = ".copies"
"""In a snapshot's directory on a node: the names of files that came from other nodes."""


class Keeper:
    """A node's. Answers two calls at a time: one may wait for another keeper."""

    def files(self, directory: str, copies: bool) -> dict[str, int]:
        """Sizes of the files below the directory, by relative path; `copies`: those of other nodes
        too."""
        sizes, left_out = {}, [] if copies else copied(Path(directory))
        for path in Path(directory).rglob("*.safetensors"):
            name = str(path.relative_to(directory))
            if name not in left_out:
                sizes[name] = path.stat().st_size
        return sizes

    def piece(self, file: str, offset: int) -> NDArray[np.uint8] | None:
        """Bytes of a file; None where its rank has begun to write a later step over it."""
        with Path(file).open("rb") as opened:
            opened.seek(offset)
            piece = np.frombuffer(opened.read(PIECE_BYTES), dtype=np.uint8)
            try:
                is_same = Path(file).stat().st_ino == os.fstat(opened.fileno()).st_ino
            except FileNotFoundError:
                is_same = False
        return piece if is_same else None

    def pull(self, source: Any, directory: str, keep: Collection[str] | None, copies: bool) -> str:
        """Takes the files that the other keeper's node has and this one lacks, whole or not at all, and
        frees copies of directories not in `keep` (None: frees nothing). `copies`: its copies too. In
        words: why not; empty where all came."""
        target = Path(directory)
        make_private(target.parents[1])
        if keep is not None:
            free_copies(target.parent, [*keep, directory])
        for name, size in ray.get(source.files.remote(directory, copies)).items():
            if not (target / name).exists():
                problem = self._pull_file(source, target, name, size)
                if problem:
                    return problem
        return ""

    def _pull_file(self, source: Any, target: Path, name: str, size: int) -> str:
        path = target / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = shortage(path.parent, size)
        if problem:
            return problem
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with draft.open("wb") as file:
                while file.tell() < size:
                    piece = ray.get(source.piece.remote(str(path), file.tell()))
                    if piece is None:
                        return f"{path} was written over meanwhile"
                    file.write(piece)
            with (target / COPIES).open("a") as copies:
                copies.write(f"{name}\n")
            draft.rename(path)
        finally:
            draft.unlink(missing_ok=True)
        return ""

    def bring(self, source: str, target: str) -> None:
        """Copies the files of a directory of this node, where it has one; a file is there whole or not
        at all."""
        for file in Path(source).glob("*"):
            draft = Path(target) / f".{file.name}.{os.getpid()}"
            shutil.copyfile(file, draft)
            draft.replace(Path(target) / file.name)

    def free(self, directory: str, keep: Collection[str]) -> None:
        """Frees this node's memory of the snapshots below the directory that are not in `keep`; of all
        of it where that is empty."""
        for path in Path(directory).glob("*/"):
            if str(path) not in keep:
                shutil.rmtree(path, ignore_errors=True)
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)


class Keepers:
    """The controller's side; see above."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}
        self._copying: list[Any] = []
        self._gave_up = False
        self._leaving: dict[str, int] = {}
        self._looked_at = 0.0
        self.here = ray.get_runtime_context().get_node_id()
        """The node of this process."""
        self._keepers()

    def leaving(self) -> set[str]:
        """Ids of the nodes that Ray was told to drain. Asks at most once a second."""
        if time.monotonic() - self._looked_at > LOOK_S:
            self._looked_at = time.monotonic()
            try:
                self._leaving = state.get_draining_nodes()
            except (RayError, RuntimeError) as error:  # the cluster itself is going
                LOGGER.warning("drain notices can't be read: %s", error)
        return set(self._leaving)

    def copy(self, directory: Path, keep: Iterable[Path]) -> None:
        """Begins a copy of every node's files in the next one's memory, unless one is under way."""
        if self._gave_up or self._is_copying():
            return
        going = self.leaving()
        staying = [keeper for node, keeper in self._keepers().items() if node not in going]
        retained = [str(path) for path in keep]
        for position, keeper in enumerate(staying):
            source = staying[position - 1]
            if source is not keeper:
                self._copying.append(keeper.pull.remote(source, str(directory), retained, False))

    def _is_copying(self) -> bool:
        if not self._copying:
            return False
        done, late = ray.wait(self._copying, num_returns=len(self._copying), timeout=0)
        self._copying = late
        for answer in done:
            try:
                problem = ray.get(answer)
            except RayError as error:
                problem = f"a node left: {str(error).splitlines()[0]}"
            if "GB are needed" in problem:
                LOGGER.warning("no more snapshots in the memory of other nodes: %s", problem)
                self._gave_up = True
        return bool(late)

    def fetch(self, directory: Path, nodes: Collection[str]) -> None:
        """Brings to these nodes what other nodes, drained ones too, have of the directory. What no node
        has is not there afterwards; whoever calls this looks."""
        deadline = time.monotonic() + FETCH_S
        keepers = self._keepers()
        for node in nodes:
            for source_node, source in keepers.items():
                if node == source_node or node not in keepers:
                    continue
                answer = keepers[node].pull.remote(source, str(directory), None, True)
                try:
                    ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
                except (RayError, GetTimeoutError) as error:
                    LOGGER.warning(
                        "%s could not be brought from node %s: %s",
                        directory,
                        source_node,
                        str(error).splitlines()[0],
                    )

    def bring(self, source: Path, target: Path, timeout_s: float) -> None:
        """Every node copies what it has of the directory `source` into `target`, at the same time.
        What a node that is lost, or slower than `timeout_s`, should have brought is not there."""
        target.mkdir(parents=True, exist_ok=True)
        keepers = self._keepers().values()
        answers = [keeper.bring.remote(str(source), str(target)) for keeper in keepers]
        ray.wait(answers, num_returns=len(answers), timeout=timeout_s)

    def free(self, directory: Path, keep: Iterable[Path]) -> None:
        """Frees all nodes' memory of the snapshots below `directory`, `keep` excepted; a copy that is
        under way is waited for."""
        retained = [str(path) for path in keep]
        answers = [*self._copying]
        answers += [
            keeper.free.remote(str(directory), retained) for keeper in self._keepers().values()
        ]
        ray.wait(answers, num_returns=len(answers), timeout=FREE_S)

    def close(self) -> None:
        if ray.is_initialized():
            for actor in self._actors.values():
                ray.kill(actor)
        self._actors = {}

    def _keepers(self) -> dict[str, Any]:
        """Those of the nodes that are there; that of a new node is started."""
        alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        actors = {node: actor for node, actor in self._actors.items() if node in alive}
        for node in set(alive) - set(actors) - self.leaving():
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"num_cpus": 0, "max_concurrency": 4, "scheduling_strategy": strategy}
            actors[node] = ray.remote(Keeper).options(**options).remote()
        self._actors = dict(sorted(actors.items()))
        return self._actors


def free_copies(run: Path, keep: Collection[str]) -> None:
    """Frees what this node holds of other nodes' snapshots, those in `keep` excepted."""
    for copies in run.glob(f"*/{COPIES}"):
        if str(copies.parent) not in keep:
            for name in copied(copies.parent):
                (copies.parent / name).unlink(missing_ok=True)
            copies.unlink(missing_ok=True)


def copied(directory: Path) -> list[str]:
    """The files of a snapshot that came to this node from others."""
    copies = directory / COPIES
    return copies.read_text().splitlines() if copies.exists() else []
