"""Episodes in processes of their own, which are Ray actors with a processor each: what environments
compute takes no time from the generation engine, may be on nodes without a GPU, and ends no more than
its own process.

All processes of a replica belong to it, so that the turns of an episode are drawn where its prompt
was read. Where one ends, or says nothing for long, its episodes start again in the others, and a new one
takes its place.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from hybridflow.context import RankContext
from hybridflow.devices import HIDDEN
from workers.agents.config import EpisodeConfig
from workers.agents.executor import Episodes
from workers.agents.interfaces import as_episode, environment_name
from workers.agents.live import Finished, LiveEpisodes, PendingRequest, Task
from workers.agents.model import Draw, Drawn, Model, Request, Segments
from workers.agents.models import Models, Plan
from workers.agents.outcome import EnvironmentMistake, Failure
from workers.agents.transcript import Transcript

LOGGER = logging.getLogger(__name__)

START_S = 300.0
"""How long processes may take to be placed and to import what the environment needs."""
NEWS_S = 5.0
"""A process without news says so after that long."""
PATIENCE_S = {True: 0.05, False: 0.002}
"""By lockstep: how long news wait for the other episodes' of the process."""
SILENCE_S = 60.0
"""Beyond episode.step_timeout_s, a process that says nothing has failed."""
END_S = 30.0
"""How long a process may take to close what its episodes have open."""


@dataclass(kw_only=True)
class News:
    """The events of one process since the last call."""

    requests: list[tuple[int, Request]] = field(default_factory=list)
    """With their numbers."""
    gone: list[int] = field(default_factory=list)
    """Requests of which nobody reads the answer any more."""
    finished: dict[int, Finished] = field(default_factory=dict)
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """The beginning of an episode."""

    task: Task
    plan: Plan
    failures: tuple[Failure, ...] = ()
    """Those of attempts in other processes."""


class EpisodeProcess:
    """The Ray actor. Its methods run side by side: `news` waits while `tell` brings answers. Each names
    the session, a number that rises; words of one that has ended are ignored."""

    def __init__(self, label: str, environment: Any, config: EpisodeConfig, models: Models) -> None:
        self.label = label
        """For Ray's dashboard and logs."""
        self.environment, self.config, self.models = environment, config, models
        self._lock = threading.Lock()
        self._session = -1
        self._episodes: Episodes | None = None
        self._plans: dict[int, Plan] = {}
        self._taken: dict[int, PendingRequest] = {}

    def ready(self) -> int:
        """Its process id, once the environment is imported."""
        as_episode(self.environment)
        return os.getpid()

    def tell(
        self, session: int, starts: Mapping[int, Start], answers: Sequence[tuple[int, Drawn]] = ()
    ) -> None:
        """Starts episodes, and answers requests by their numbers."""
        episodes = self._episodes_of(session)
        if episodes is None:
            return
        with self._lock:
            self._plans |= {row: start.plan for row, start in starts.items()}
            known = []
            for number, reply in answers:
                if (pending := self._taken.pop(number, None)) is not None:
                    known.append((pending, reply))
        if known:
            episodes.answer(known)
        if starts:
            tasks = {row: start.task for row, start in starts.items()}
            episodes.start(tasks, {row: start.failures for row, start in starts.items()})

    def news(self, session: int) -> News:
        """Those since the last call, or none after NEWS_S."""
        episodes = self._episodes_of(session)
        if episodes is None:
            return News()
        try:
            if episodes.wait_for_news(NEWS_S):
                episodes.wait(1.0, PATIENCE_S[self.config.lockstep])
        except Exception as error:  # the environment's; the replica raises it
            return News(error=_sendable(error))
        requests = episodes.requests()
        with self._lock:
            gone = [number for number, pending in self._taken.items() if pending.is_gone]
            for number in gone:
                del self._taken[number]
            for pending in requests:
                self._taken[pending.number] = pending
        return News(
            requests=[(pending.number, pending.request) for pending in requests],
            gone=gone,
            finished=episodes.finished(),
        )

    def end(self, session: int) -> None:
        """Cancels the session's episodes."""
        with self._lock:
            if session < self._session:
                return
            self._session = session + 1
            episodes, self._episodes = self._episodes, None
        if episodes is not None:
            episodes.close()

    def _episodes_of(self, session: int) -> Episodes | None:
        """The session's, which begins with the first word of it; None where it is over."""
        with self._lock:
            if session == self._session and self._episodes is not None:
                return self._episodes
            if session < self._session:
                return None
            self._session = session
            self._plans, self._taken = {}, {}
            interface = as_episode(self.environment)
            self._episodes = Episodes(
                interface.episode, interface.name, self.config, self._make_model
            )
            return self._episodes

    def _make_model(self, row: int, draw: Draw) -> Model:
        return self.models.make(row, draw, self._plans[row])

    def __repr__(self) -> str:
        return self.label


class Processes:
    """processes = Processes(2, context, environment, config, models)
    actor = processes.actors[0]
    processes.replace(0)
    processes.close()
    """

    def __init__(
        self,
        number: int,
        context: RankContext,
        environment: Any,
        config: EpisodeConfig,
        models: Models,
    ) -> None:
        """Returns when every process has imported the environment."""
        import ray

        self.name, self.config = environment_name(environment), config
        self.next_session = itertools.count()
        shared = ray.put(environment), ray.put(config), ray.put(models)
        actor = ray.remote(EpisodeProcess).options(
            num_cpus=1,
            max_concurrency=4,
            runtime_env={"env_vars": HIDDEN | {"OMP_NUM_THREADS": "1"}},
        )
        self._starts = [
            partial(actor.remote, f"{context.pool}/{context.rank} episodes {place}", *shared)
            for place in range(number)
        ]
        self.actors: list[Any] = [start() for start in self._starts]
        try:
            ray.get([actor.ready.remote() for actor in self.actors], timeout=START_S)
        except ray.exceptions.RayError as error:
            self.close()
            raise _not_started(error, number) from None

    def replace(self, place: int) -> None:
        """Ends the process, and starts another one in its place."""
        self._kill(place)
        self.actors[place] = self._starts[place]()

    def close(self) -> None:
        """Ends all."""
        for place in range(len(self.actors)):
            self._kill(place)
        self.actors = []

    def _kill(self, place: int) -> None:
        import ray

        ray.kill(self.actors[place], no_restart=True)


@dataclass(eq=False, slots=True)
class PlacedRequest(PendingRequest):
    """A request of an episode in the process at that place, which numbered it."""

    place: int = 0


class EpisodesInProcesses(LiveEpisodes):
    """episodes = EpisodesInProcesses(processes, plans)

    plans[row]: how the row is drawn, read when it starts.
    """

    def __init__(self, processes: Processes, plans: Sequence[Plan] | Mapping[int, Plan]) -> None:
        super().__init__()
        self._processes, self._plans = processes, plans
        self._session = next(processes.next_session)
        places = range(len(processes.actors))
        self._turns = itertools.cycle(places)
        self._rows: list[dict[int, Start]] = [{} for _ in places]
        """The live episodes of each place."""
        self._waiting: list[dict[int, PlacedRequest]] = [{} for _ in places]
        """The requests of each place that have no answer, by their numbers there."""
        self._is_closed = False
        for place in places:
            threading.Thread(target=self._follow, args=(place,), daemon=True).start()

    def start(self, tasks: Mapping[int, Task]) -> None:
        """See LiveEpisodes.start."""
        with self._changed:
            self._live |= tasks.keys()
            self._deal(
                {row: Start(task=task, plan=self._plans[row]) for row, task in tasks.items()}
            )

    def answer(self, answers: Sequence[tuple[PendingRequest, Drawn]]) -> None:
        """See LiveEpisodes.answer."""
        with self._changed:
            messages: dict[int, list[tuple[int, Drawn]]] = defaultdict(list)
            for pending, reply in answers:
                assert isinstance(pending, PlacedRequest), "it is of requests()"
                if not pending.is_gone:
                    del self._waiting[pending.place][pending.number]
                    messages[pending.place].append((pending.number, reply))
            for place, replies in messages.items():
                self._processes.actors[place].tell.remote(self._session, {}, replies)

    def close(self) -> None:
        """See LiveEpisodes.close. A process that takes over END_S is replaced."""
        import ray

        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        actors = self._processes.actors
        ends = [actor.end.remote(self._session) for actor in actors]
        _, late = ray.wait(ends, num_returns=len(ends), timeout=END_S)
        for place, end in enumerate(ends):
            if end in late or not _has_ended(end):
                self._processes.replace(place)

    def _deal(self, starts: Mapping[int, Start]) -> None:
        """Gives the rows to the processes in turn."""
        messages: dict[int, dict[int, Start]] = defaultdict(dict)
        for row, start in starts.items():
            messages[next(self._turns)][row] = start
        for place, of_place in messages.items():
            self._rows[place] |= of_place
            self._processes.actors[place].tell.remote(self._session, of_place)
        self._changed.notify_all()

    def _follow(self, place: int) -> None:
        """In a thread of its own: reads the news of a process while it has live episodes."""
        import ray

        limit_s = self._processes.config.step_timeout_s + SILENCE_S
        while self._waits_for_rows(place):
            actor = self._processes.actors[place]
            try:
                ray.get(actor.ready.remote(), timeout=START_S)
                while self._waits_for_rows(place):
                    self._read(place, ray.get(actor.news.remote(self._session), timeout=limit_s))
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                self._lose(place, _reason(error, limit_s))
            except Exception as error:  # for the thread that waits, which raises it
                self._fail(error)
                return

    def _waits_for_rows(self, place: int) -> bool:
        """Waits until the place has live episodes; False once all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or bool(self._rows[place]))
            return not self._is_closed

    def _read(self, place: int, news: News) -> None:
        with self._changed:
            waiting = self._waiting[place]
            for number in news.gone:
                if number in waiting:
                    self._forget(waiting.pop(number))
            for number, request in news.requests:
                waiting[number] = PlacedRequest(request, number, place=place)
                self._take(waiting[number])
            for row, finished in news.finished.items():
                del self._rows[place][row]
                self._end(row, finished)
            if news.error is not None:
                self._fail(news.error)

    def _lose(self, place: int, reason: str) -> None:
        """The process has ended: the episodes whose environments were at work have failed an attempt,
        since one of them may have ended it; those that waited for a reply have not."""
        with self._changed:
            if self._is_closed:
                return
            rows, self._rows[place] = self._rows[place], {}
            waiting, self._waiting[place] = self._waiting[place], {}
            for pending in waiting.values():
                self._forget(pending)
            LOGGER.warning(
                "environment=%s: a process with %d episodes %s; they start again in others",
                self._processes.name,
                len(rows),
                reason,
            )
            self._processes.replace(place)
            at_work = rows.keys() - {pending.request.row for pending in waiting.values()}
            failure, again = Failure("process", f"its process {reason}"), {}
            for row, start in rows.items():
                failures = start.failures
                if row in at_work or not at_work:
                    failures = (*failures, failure)
                if len(failures) > self._processes.config.retries:
                    nothing = Segments(transcripts=[Transcript()])
                    self._end(
                        row, Finished(segments=nothing, outcome=None, failures=list(failures))
                    )
                else:
                    again[row] = replace(start, failures=failures)
            self._deal(again)


def _not_started(error: Exception, number: int) -> Exception:
    """The error of a process that does not start, in a line."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        return error.cause
    if isinstance(error, ray.exceptions.GetTimeoutError):
        free = ray.available_resources().get("CPU", 0.0)
        return ValueError(
            f"episode.processes={number}: they did not start within {START_S:.0f} s on a processor "
            f"each; free in the cluster: {free:g}; use fewer, or add nodes"
        )
    return ValueError(
        f"episode.processes={number}: one of them ended while it imported the environment; its log "
        "(cluster.worker_logs=true) may say why"
    )


def _has_ended(end: Any) -> bool:
    """Whether the call that ended a session came to its end; False where its process died."""
    import ray

    try:
        ray.get(end)
    except ray.exceptions.RayActorError:
        return False
    return True


def _reason(error: Exception, limit_s: float) -> str:
    """Why a process no longer takes part, as the end of a sentence."""
    import ray

    if isinstance(error, ray.exceptions.GetTimeoutError):
        return f"did not answer for {limit_s:.0f} s"
    return "ended (killed, crashed in native code, or out of memory)"


def _sendable(error: Exception) -> Exception:
    """The error as another process can read it, whatever it holds."""
    if isinstance(error, EnvironmentMistake):
        return EnvironmentMistake(str(error))
    LOGGER.error("".join(traceback.format_exception(error)))
    return RuntimeError(f"a process of episodes failed: {type(error).__name__}: {error}")
