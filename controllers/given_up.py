"""Groups of episodes that were given up: which rows of a step have an answer, and how many must.

A group of which an episode failed every time has no reward, and nothing may be learned from it or
counted of it. The roles that an algorithm's page is given here leave its rows out of
`prompts | actor.generate_sequences(prompts)`, so that no page, statistic or update meets them. They
are counted over all generations of a step, and where they are too many the step ends before its
first update.

Leaves out why an episode fails and how often it is tried (workers/agents/executor.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from controllers.algorithm_base import Algorithm
from controllers.episodes import whole_rows
from hybridflow.batch import Batch
from hybridflow.errors import UserCodeError
from hybridflow.results import Metrics
from workers.agents.config import EpisodeConfig


class GivenUp:
    """given_up = GivenUp("my_module:Guess", config.episode)
    roles = given_up.watched(roles)                     # as the algorithm sees them
    algorithm = StepsOfEpisodes(create_algorithm(name, roles, settings), given_up)
    """

    def __init__(self, environment: str, config: EpisodeConfig) -> None:
        self._environment, self._config = environment, config
        self._is_checked = False
        self.begin()

    def begin(self) -> None:
        """A step begins: nothing was drawn for it."""
        self._groups: set[int] = set()
        self._reasons: dict[int, str] = {}
        """uid -> why its group was given up."""
        self._failures: Counter[str] = Counter()
        """Failed attempts by kind of error."""
        self._num_rows: Counter[int] = Counter()
        """uid -> the rows of its group in one generation."""

    def add(self, prompts: Batch, episodes: Batch) -> None:
        """Counts the episodes of these prompts; waits for them."""
        if self._is_checked:
            self._is_checked = False
            self.begin()
        uids = prompts.tensor("uid").tolist()
        self._groups.update(uids)
        whole = whole_rows(episodes).tolist()
        self._num_rows |= Counter(uids)
        for uid, of_row, counted in zip(
            uids, episodes.objects("episode_metrics"), whole, strict=True
        ):
            self._failures.update(of_row["failures"])
            if not counted:
                self._reasons.setdefault(uid, of_row["reason"])

    def check(self) -> None:
        """UserCodeError where over episode.max_given_up of the step's groups were given up."""
        self._is_checked = True
        number, most = len(self._reasons), self._config.max_given_up
        if number > most * len(self._groups):
            raise UserCodeError(
                f"environment={self._environment}: {number} of {len(self._groups)} groups had an "
                f"episode that failed {1 + self._config.retries} times, more than "
                f"episode.max_given_up={most}; the first because "
                f"{next(iter(self._reasons.values()))}"
            )

    def metrics(self) -> dict[str, float]:
        """Rows of groups that were given up, and failed attempts by kind of error."""
        failed = {f"episode/failed/{kind}": float(n) for kind, n in self._failures.items()}
        num_rows = sum(self._num_rows[uid] for uid in self._reasons)
        return {"episode/given_up": float(num_rows), **failed}

    def watched(self, roles: Mapping[str, Any]) -> dict[str, Any]:
        """The roles of a page that trains on episodes."""
        return {name: WatchedRole(role, self) for name, role in roles.items()}


class WatchedRole:
    """A role's handle whose generations leave out the rows of groups that were given up, and whose
    updates come after the check of how many there are; all else is the role's own."""

    def __init__(self, role: Any, given_up: GivenUp) -> None:
        self._role, self._given_up = role, given_up

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._role, name)
        if name == "generate_sequences":
            return partial(self._generate, method)
        if name.startswith("update_"):
            return partial(self._update, method)
        return method

    def __repr__(self) -> str:
        return repr(self._role)

    def _generate(self, generate: Any, prompts: Batch, *arguments: Any, **options: Any) -> Batch:
        episodes: Batch = generate(prompts, *arguments, **options)
        self._given_up.add(prompts, episodes)
        whole = whole_rows(episodes)
        return episodes if whole.all() else episodes.only_where(whole.numpy())

    def _update(self, update: Any, batch: Batch, *arguments: Any, **options: Any) -> Metrics:
        self._given_up.check()
        metrics: Metrics = update(batch, *arguments, **options)
        return metrics


class CheckedGenerator:
    """A generator whose episodes nothing is trained on: all rows stay, those of groups that were
    given up with their finish reason, and each generation is checked by itself."""

    def __init__(self, generator: Any, given_up: GivenUp) -> None:
        self._generator, self._given_up = generator, given_up

    def generate_sequences(self, prompts: Batch, *arguments: Any, **options: Any) -> Batch:
        episodes: Batch = self._generator.generate_sequences(prompts, *arguments, **options)
        self._given_up.add(prompts, episodes)
        self._given_up.check()
        return episodes


class StepsOfEpisodes:
    """An algorithm whose rows are episodes: each step counts its own, and logs them."""

    def __init__(self, algorithm: Algorithm, given_up: GivenUp) -> None:
        self.config: Any = algorithm.config
        self._algorithm, self._given_up = algorithm, given_up

    def step(self, prompts: Batch) -> Metrics:
        self._given_up.begin()
        return self._algorithm.step(prompts) | self._given_up.metrics()

    def state_dict(self) -> dict[str, Any]:
        return self._algorithm.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._algorithm.load_state_dict(state)
