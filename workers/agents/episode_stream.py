"""EpisodeStream: episodes of one generation engine that go on in slices of generation, in the place of
RowStream.

Between two slices weights may come and episodes be added; the environments go on meanwhile. In
lockstep a slice ends with the replies of a round, so that it does not depend on how long
environments take.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from hybridflow.batch import Batch
from workers.agents.live import Finished, LiveEpisodes, PendingRequest
from workers.agents.model import Drawn, Request
from workers.agents.models import Plan
from workers.agents.sampler import EpisodeSampler
from workers.roles import EndedRow, Progress, RowName
from workers.row_stream import row_names

PATIENCE_S = 0.05
"""How long a slice without lockstep waits for a request where the engine has nothing to do."""
STEPS_PER_LOOK = 4
"""Engine steps after which it looks for new requests."""


class EpisodeStream:
    """See RowStream."""

    def __init__(self, sampler: EpisodeSampler) -> None:
        self._sampler = sampler
        self._lockstep = sampler.config.episode.lockstep
        self._replica = sampler.replica
        self._episodes: LiveEpisodes | None = None
        self._next_row = 0
        self._names: dict[int, RowName] = {}
        """The episodes that are live, by the number that they run under."""
        self._plans: dict[int, Plan] = {}
        self._drawing: list[int] = []
        """The engine's keys of the requests that it works on."""
        self._pending: list[PendingRequest] = []
        """The same requests, on the rank that runs the episodes."""
        self._replies: list[tuple[PendingRequest, Drawn]] = []
        """To requests of the round that is under way."""
        self._ended: dict[RowName, Finished] = {}

    def submit(self, prompts: Batch, *, do_sample: bool = True) -> None:
        """See StreamingGenerator.submit."""
        if not self._replica.leads:
            return
        names = row_names(prompts, greedy=not do_sample)
        plans = self._sampler.plans(prompts, do_sample=do_sample)
        rows = range(self._next_row, self._next_row + len(names))
        self._next_row += len(names)
        self._names |= zip(rows, names, strict=True)
        self._plans |= zip(rows, plans, strict=True)
        if self._episodes is None:
            self._episodes = self._sampler.episodes(self._plans)
        self._episodes.start(dict(zip(rows, prompts.objects("task"), strict=True)))

    def advance(self, limit: int) -> Progress:
        """See StreamingGenerator.advance; the engine has its weights."""
        started, num_steps = time.perf_counter(), 0
        if limit > 0 and self._replica.leads:
            num_steps = self._lead(limit)
        elif limit > 0:
            self._replica.follow(self._compute)
        ended = []
        if self._episodes is not None:
            for row, finished in self._episodes.finished().items():
                ended.append(self._end(row, finished))
        return Progress(
            finished=tuple(ended), num_steps=num_steps, seconds=time.perf_counter() - started
        )

    def _lead(self, limit: int) -> int:
        try:
            if self._episodes is None:
                return 0
            if self._lockstep:
                return self._round(self._episodes, limit)
            return self._any(self._episodes, limit)
        finally:
            self._replica.end()

    def _end(self, row: int, finished: Finished) -> EndedRow:
        name = self._names.pop(row)
        del self._plans[row]
        self._ended[name] = finished
        versions = []
        for transcript in finished.segments.transcripts:
            versions += transcript.weight_versions
        present = self._sampler.engine.weight_version
        return EndedRow(name, min(versions, default=present), max(versions, default=present))

    def _round(self, episodes: LiveEpisodes, limit: int) -> int:
        """Steps of the round that is under way, or of the next one, for which every live episode
        has to ask; ends with it."""
        if not self._drawing:
            episodes.wait(1.0)
        num_steps = self._work(episodes, limit)
        if not self._drawing:
            self._answer(episodes)
            episodes.wait(1.0)  # those that end with these replies do so in this slice
        return num_steps

    def _any(self, episodes: LiveEpisodes, limit: int) -> int:
        """Steps for whichever requests there are."""
        num_steps = 0
        while num_steps < limit:
            episodes.wait(0.0, 0.0 if self._drawing else PATIENCE_S)
            steps = self._work(episodes, min(STEPS_PER_LOOK, limit - num_steps))
            self._answer(episodes)
            num_steps += steps
            if not steps:
                break
        return num_steps

    def _work(self, episodes: LiveEpisodes, limit: int) -> int:
        """Takes in the requests that nobody has taken, and has all ranks run steps; returns their
        number."""
        pending = [] if self._lockstep and self._drawing else episodes.requests()
        if not pending and not self._drawing:
            return 0
        gone = [place for place, pending in enumerate(self._pending) if pending.is_gone]
        for place in reversed(gone):
            del self._pending[place]
        work = [(waiting.request, self._plans[waiting.request.row]) for waiting in pending]
        self._pending += pending
        return self._replica.compute(self._compute, gone, work, limit)

    def _compute(
        self, gone: Sequence[int], work: Sequence[tuple[Request, Plan]], limit: int
    ) -> int:
        """On every rank: at most `limit` engine steps for the requests so far and these, without
        those that are `gone`, since their episodes have stopped waiting."""
        engine = self._sampler.engine
        engine.cancel([self._drawing[place] for place in gone])
        for place in reversed(gone):
            del self._drawing[place]
        for request, plan in work:
            self._drawing.append(self._sampler.ask(request, plan))
        num_steps = engine.run(limit, until=self._drawing)
        for key, row in engine.finished(self._drawing).items():
            place = self._drawing.index(key)
            del self._drawing[place]
            if self._replica.leads:
                pending = self._pending.pop(place)
                self._replies.append((pending, self._sampler.reply(row, pending.request)))
        return num_steps

    def _answer(self, episodes: LiveEpisodes) -> None:
        """Hands out the replies that are complete."""
        replies, self._replies = self._replies, []
        episodes.answer(replies)

    def collect(self, rows: Batch, *, do_sample: bool = True) -> Batch:
        """See StreamingGenerator.collect; groups are whole."""
        if not self._replica.leads:
            return Batch.of()
        names = row_names(rows, greedy=not do_sample)
        ended = [self._ended.pop(name) for name in names]
        return self._sampler.rows(ended, [name.uid for name in names])

    def discard(self) -> None:
        """See StreamingGenerator.discard."""
        self.close()
        self._sampler.engine.cancel(self._drawing)
        for of_rows in (self._names, self._plans, self._ended):
            of_rows.clear()
        for of_requests in (self._drawing, self._pending, self._replies):
            of_requests.clear()

    def close(self) -> None:
        """Ends all episodes."""
        if self._episodes is not None:
            self._episodes.close()
            self._episodes = None
