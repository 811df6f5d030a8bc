"""Virtual time, processes, nodes with memory, ranks, and weights whose every update is a hash of the
weights before it and of the rows: one row lost, doubled, or sampled with old weights shows at the
end."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from itertools import count
from zlib import crc32

from tests.recovery.simulation.crash_files import CrashFiles

Wait = Generator[float, None, None]
Weights = dict[int, int]
"""A role's tensors by index."""

TENSORS = 2
ROWS_PER_STEP = 3
TRAINED = ("actor", "critic")


def mix(*values: int) -> int:
    """A hash of integers, the same in every process."""
    return hash(values) & 0xFFFFFFFFFFFFFFFF


def start_weights(role: str) -> Weights:
    return {tensor: mix(len(role), tensor, 7) for tensor in range(TENSORS)}


def digest(weights: Mapping[str, Weights]) -> int:
    """The same for every layout: a sum over tensors."""
    total = 0
    for role, tensors in weights.items():
        for tensor, value in tensors.items():
            total += mix(len(role), tensor, value)
    return total & 0xFFFFFFFFFFFFFFFF


def rows_from(position: int) -> tuple[int, ...]:
    return tuple(mix(row, 1) for row in range(position, position + ROWS_PER_STEP))


def marked(rows: tuple[int, ...]) -> tuple[int, ...]:
    """Rows that no step trains on, as the ledger has them."""
    return tuple(-row for row in rows)


def sample(generator: int, rows: tuple[int, ...]) -> int:
    return mix(generator, *rows)


def updated(role: str, tensor: int, value: int, rows: tuple[int, ...], numbers: int) -> int:
    return mix(len(role), tensor, value, numbers, *rows)


@dataclass(frozen=True, slots=True)
class Truth:
    """An undisturbed run, computed without the machine, the controller, or files."""

    weights: tuple[Mapping[str, Weights], ...]
    """After each step, from 0."""
    ledger: tuple[str, ...]


def ledger_line(step: int, rows: tuple[int, ...], number: int) -> str:
    """Step, rows, digest, and a checksum: a line that was not synced may come back with a wrong bit
    that nobody else notices."""
    line = f"{step} {','.join(map(str, rows))} {number:016x}"
    return f"{line} {crc32(line.encode()):08x}"


def is_whole(line: str) -> bool:
    text, _, checksum = line.rpartition(" ")
    return checksum == f"{crc32(text.encode()):08x}"


def undisturbed(num_steps: int, given_up: frozenset[int] = frozenset()) -> Truth:
    """`given_up`: positions of rows whose gradient is not finite: they are passed over."""
    weights = {role: start_weights(role) for role in TRAINED}
    states, lines = [weights], [ledger_line(0, (), digest(weights))]
    position = 0
    for step in range(1, num_steps + 1):
        passed_over: tuple[int, ...] = ()
        while position in given_up:
            passed_over += marked(rows_from(position))
            position += ROWS_PER_STEP
        rows = rows_from(position)
        position += ROWS_PER_STEP
        drawn = sample(digest({"actor": weights["actor"]}), rows)
        numbers = mix(drawn, digest({"critic": weights["critic"]}))
        later = {}
        for role, tensors in weights.items():
            later[role] = {
                tensor: updated(role, tensor, value, rows, numbers)
                for tensor, value in tensors.items()
            }
        weights = later
        states.append(weights)
        lines.append(ledger_line(step, passed_over + rows, digest(weights)))
    return Truth(weights=tuple(states), ledger=tuple(lines))


class Killed(BaseException):
    """SIGKILL in the middle of a file operation."""


class PowerCut(BaseException):
    """Every machine loses its power in the middle of a file operation."""


@dataclass(slots=True, eq=False)
class Process:
    """Something that runs in virtual time; every number that it yields is a wait in seconds."""

    waits: Wait
    ended: Callable[[], None]
    attempt: int
    alive: bool = True
    frozen_until: float = 0.0


@dataclass(slots=True, eq=False)
class MemoryFile:
    tensors: Weights
    damaged: bool = False


@dataclass(slots=True, eq=False)
class Node:
    number: int
    up: bool = True
    memory: dict[tuple[int, int, str, int], MemoryFile] = field(default_factory=dict)
    """By attempt, step, role and rank."""


@dataclass(slots=True, eq=False)
class Rank:
    pool: str
    role: str
    index: int
    num_ranks: int
    node: Node
    attempt: int
    incarnation: int
    trouble: str = ""
    """died, hung or raised, until its pool is rebuilt."""
    tensors: Weights = field(default_factory=dict)
    generator: int = 0
    """The digest of the weights with which a generation rank samples."""

    def owns(self, tensor: int) -> bool:
        return tensor % self.num_ranks == self.index


@dataclass(frozen=True, slots=True)
class Record:
    """The controller's part of a commit in memory."""

    attempt: int
    step: int
    files: tuple[tuple[Node, tuple[int, int, str, int]], ...]
    metadata: Mapping[str, object]

    def is_whole(self) -> bool:
        return all(node.up and key in node.memory for node, key in self.files)


WIDE = {"policy": [("actor", 2)], "values": [("critic", 1)], "samples": [("generator", 1)]}
NARROW = {"policy": [("actor", 1)], "values": [("critic", 1)], "samples": [("generator", 1)]}
COLOCATED = {"all": [("actor", 2), ("critic", 1), ("generator", 1)]}
RANKS_PER_NODE = 3
NUM_NODES = 3


class Cluster:
    """Time, nodes, files; the head's power is that of the files."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.files = CrashFiles()
        self.nodes = [Node(number) for number in range(NUM_NODES)]
        self.records: dict[tuple[int, int], Record] = {}
        """Commits in memory, by attempt and step; on the head."""
        self.ranks: list[Rank] = []
        self.processes: list[Process] = []
        self.chance = random.Random(seed)
        self.power_cut_asked = False
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def after(self, seconds: float, run: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), run))

    def run_until(self, ended: Callable[[], bool], limit: float) -> None:
        while self._queue and not ended() and self.now < limit:
            self.now, _, run = heapq.heappop(self._queue)
            run()

    def spawn(self, waits: Wait, attempt: int, ended: Callable[[], None]) -> Process:
        process = Process(waits, ended, attempt)
        self.processes.append(process)
        self.after(0.0, lambda: self._resume(process))
        return process

    def _resume(self, process: Process) -> None:
        if not process.alive:
            return
        if process.frozen_until > self.now:
            self.after(process.frozen_until - self.now, lambda: self._resume(process))
            return
        try:
            seconds = next(process.waits)
        except (StopIteration, Killed):
            self.processes.remove(process)
            process.alive = False
            process.ended()
        except PowerCut:
            self.power_cut()
        else:
            self.after(seconds, lambda: self._resume(process))

    def kill_attempt(self, attempt: int) -> None:
        """A controller's death takes its ranks and threads with it."""
        self.ranks = [rank for rank in self.ranks if rank.attempt != attempt]
        for process in list(self.processes):
            if process.attempt == attempt:
                process.alive = False
                self.processes.remove(process)

    def power_cut(self) -> None:
        ended = list(self.processes)
        self.ranks, self.processes, self.records = [], [], {}
        for process in ended:
            process.alive = False
        for node in self.nodes:
            node.memory.clear()
        self.files.power_cut(self.chance)
        for process in ended:
            process.ended()

    def lose_node(self, node: Node, returns_after: float | None) -> None:
        node.up = False
        node.memory.clear()
        for rank in self.ranks:
            if rank.node is node:
                rank.trouble = "died"

        def back() -> None:
            node.up = True

        if returns_after is not None:
            self.after(returns_after, back)
