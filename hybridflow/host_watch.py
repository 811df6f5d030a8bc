"""HostWatch: looks at all hosts between two steps, scores them, and says what a person should know.

    watch = HostWatch(pools, Path("outputs/ppo"))
    watch.look(step=7)          # after every step: takes the answers that came, and asks again
    watch.values                # numbers for the trackers

Nothing is waited for: a host answers behind its calls. It spends COST_FRACTION of the time on answers
at most: where steps are short, hosts are asked after several. Hosts whose work goes on in the background
(asynchronous generation) are not asked, as they are never between two steps. What is not a number of a
step is in hosts.jsonl, a line a look.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybridflow.disk import LineFile
from hybridflow.host_state import HostState
from hybridflow.pool import ResourcePool
from hybridflow.stragglers import Scores, Straggler
from hybridflow.waiting import CALLS

LOGGER = logging.getLogger(__name__)
HOSTS = "hosts.jsonl"
COST_FRACTION = 0.004
"""The part of a run's time that hosts may spend on answers."""
FIRST_COST_S = 0.05
"""The cost of an answer before the first one came."""
NEAR = 0.9
"""A container that uses this part of its limit is near it."""


class HostWatch:
    """See above."""

    def __init__(
        self,
        pools: Mapping[str, ResourcePool],
        directory: Path | None,
        *,
        cost_fraction: float = COST_FRACTION,
    ) -> None:
        """`directory`: where hosts.jsonl is written; None: nowhere."""
        self._pools, self._cost_fraction = pools, cost_fraction
        self._file = None if directory is None else LineFile(directory / HOSTS)
        self._scores = Scores()
        self._asked: dict[str, Sequence[Any]] = {}
        """Pool -> references to the answers of its hosts."""
        self._asked_at, self._cost_s = -math.inf, FIRST_COST_S
        self._pids: dict[tuple[str, int], int] = {}
        self._kills: dict[str, int] = {}
        self._near: set[str] = set()
        """Nodes that were said to be near their limit."""
        self.values: dict[str, float] = {}
        """host/<pool>/<rank>/<metric> and node/<address>/<metric>."""

    def look(self, step: int) -> None:
        """Takes the answers of the last look, where all are there, and asks again where that is due.
        For the moment after a step, before its snapshot."""
        self._take(step)
        now = time.monotonic()
        if self._asked or now - self._asked_at < self._cost_s / self._cost_fraction:
            return
        self._asked_at = now
        busy = {pool for pool, _ in CALLS.background}
        for name, pool in self._pools.items():
            answers = () if name in busy or pool.broken else pool.look()
            if answers:
                self._asked[name] = answers

    def _take(self, step: int) -> None:
        states: list[HostState] = []
        for name, answers in list(self._asked.items()):
            pool = self._pools[name]
            came = pool.looked(answers)
            if came is None:
                if not pool.broken:
                    continue
                came = []
            del self._asked[name]
            states += came
        if not states:
            return
        self._cost_s = max(state.cost_s for state in states)
        named = self._score(states)
        for state in states:
            self._note(state)
        for straggler in named:
            self._say(straggler, states)
        self._look_at_memory(states)
        if self._file is not None:
            self._file.append(json.dumps(self._line(step, states)))

    def _score(self, states: Sequence[HostState]) -> list[Straggler]:
        for state in states:
            host = (state.pool, state.rank)
            if self._pids.setdefault(host, state.pid) != state.pid:
                self._scores.forget(host)
                self._pids[host] = state.pid
        return self._scores.add({(state.pool, state.rank): state.probe_s for state in states})

    def _note(self, state: HostState) -> None:
        host, node = f"host/{state.pool}/{state.rank}", f"node/{state.node}"
        self.values |= {
            f"{host}/straggler_score": self._scores.relative(state.pool, state.rank),
            f"{host}/individual_score": self._scores.individual(state.pool, state.rank),
            f"{host}/resident_bytes": float(state.resident_bytes),
            f"{host}/peak_bytes": float(state.peak_bytes),
            f"{node}/memory_used_bytes": float(state.used_bytes),
            f"{node}/memory_limit_bytes": float(state.limit_bytes),
            f"{node}/oom_kills": float(state.oom_kills),
        }

    def _say(self, straggler: Straggler, states: Sequence[HostState]) -> None:
        pool, rank = straggler.host
        (state,) = [state for state in states if (state.pool, state.rank) == straggler.host]
        LOGGER.warning(
            "%s rank %d of pool %s (pid %d on %s) is slow: it computes at %.0f %% of the other "
            "hosts' speed and at %.0f %% of its own best; look for other processes, a hot or failing "
            "device on that node",
            "+".join(self._pools[pool].role_names),
            rank,
            pool,
            state.pid,
            state.node,
            100 * straggler.relative,
            100 * straggler.individual,
        )

    def _look_at_memory(self, states: Sequence[HostState]) -> None:
        for node in dict.fromkeys(state.node for state in states):
            self._look_at_node(node, [state for state in states if state.node == node])

    def _look_at_node(self, node: str, states: Sequence[HostState]) -> None:
        fullest = max(states, key=lambda state: state.used_bytes)
        in_use = f"{fullest.used_bytes / 1e9:.3g} of {fullest.limit_bytes / 1e9:.3g} GB are in use"
        kills = max(state.oom_kills for state in states)
        before = self._kills.setdefault(node, kills)
        if kills > before:
            LOGGER.warning(
                "node %s: the kernel has ended %d processes for want of memory since the last look; "
                "%s",
                node,
                kills - before,
                in_use,
            )
        self._kills[node] = kills
        is_near = fullest.used_bytes > NEAR * fullest.limit_bytes > 0
        if is_near and node not in self._near:
            largest = max(states, key=lambda state: state.resident_bytes)
            LOGGER.warning(
                "node %s: %s, and the kernel ends processes where none is left; the largest host is "
                "rank %d of pool %s with %.3g GB: use smaller micro-batches, more devices, or more "
                "memory",
                node,
                in_use,
                largest.rank,
                largest.pool,
                largest.resident_bytes / 1e9,
            )
        (self._near.add if is_near else self._near.discard)(node)

    def _line(self, step: int, states: Sequence[HostState]) -> dict[str, Any]:
        hosts = []
        for state in states:
            host = asdict(state)
            host["probe_s"] = None if math.isnan(state.probe_s) else state.probe_s
            host["relative"] = self._scores.relative(state.pool, state.rank)
            host["individual"] = self._scores.individual(state.pool, state.rank)
            hosts.append(host)
        return {"step": step, "time_s": time.time(), "hosts": hosts}
