"""Replica: the ranks that compute one generation engine together, of which one runs the episodes.

The others take part in the engine's work alone: the leader tells them what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.protocols import THREE_D_ALL_MICRO_DP, data_groups

T = TypeVar("T")
TIMEOUT = timedelta(days=1)
"""A follower waits for environments, which the controller's deadlines limit."""


class Replica:
    """replica = Replica(layout, context)
    if replica.leads:
        answer = replica.compute(engine_work, arguments)    # as often as there is work
        replica.end()
    else:
        replica.follow(engine_work)
    """

    def __init__(self, layout: Layout, context: RankContext) -> None:
        """Collective over the pool."""
        self.leader, self._group = context.rank, None
        self._fails = False
        """Whether the work fails, on every rank alike."""
        leaders = set(THREE_D_ALL_MICRO_DP.collected(layout))  # whose answers are kept
        for ranks in data_groups(layout):
            if len(ranks) == 1:
                continue
            group = dist.new_group(list(ranks), backend="gloo", timeout=TIMEOUT)
            if context.rank in ranks:
                self._group = group
                (self.leader,) = leaders.intersection(ranks)
        self.leads = self.leader == context.rank

    def compute(self, function: Callable[..., T], *arguments: Any) -> T:
        """function(*arguments) on every rank, the leader's result."""
        self._share(arguments)
        self._fails = True
        result = function(*arguments)
        self._fails = False
        return result

    def end(self) -> None:
        """Ends what the followers do; where the work failed they have ended as well."""
        if not self._fails:
            self._share(None)
        self._fails = False

    def follow(self, function: Callable[..., object]) -> None:
        """Takes part in the leader's work until it ends."""
        while (arguments := self._share(None)) is not None:
            function(*arguments)

    def _share(self, arguments: Any) -> Any:
        """The leader's arguments, on every rank."""
        if self._group is None:
            return arguments
        shared = [arguments]
        dist.broadcast_object_list(shared, src=self.leader, group=self._group)
        return shared[0]
