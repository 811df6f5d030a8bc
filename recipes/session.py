"""Session: the cluster, pools, roles, data and metrics of a run while it lives.

    with open_session("grpo", ["model.path=...", "data.train=..."], reward=my_function) as session:
        for _ in range(100):
            print(session.step())
        session.save("out")

`run` drives the same session by Driver.run. Leaves out how settings become a Preparation
(preparation.py).
"""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from controllers import QUESTIONS, create_algorithm
from controllers.algorithm_base import Algorithm, Evaluated
from controllers.data import RowDataset, RowLoader
from controllers.given_up import CheckedGenerator, GivenUp, StepsOfEpisodes
from controllers.loop import Loop, Outcome, phase_seconds
from controllers.outcome import logged_steps
from controllers.recovery import Driver
from controllers.samples import SampleReader
from controllers.streams import EmptyStream, PromptStream, RowSource, Stream, TextStream
from controllers.validation import HeldOutRows, ResponseReward, Validate
from hybridflow.batch import Batch
from hybridflow.checkpoint import CheckpointStore
from hybridflow.failures import EventLog
from hybridflow.metrics import Tracker
from hybridflow.metrics.jsonl import METRICS
from hybridflow.pool import ResourcePool
from hybridflow.progress import activity
from hybridflow.progress_display import shown
from hybridflow.recovery.attempts import Attempt
from hybridflow.recovery.holders import check_nobody_holds, hold, release
from hybridflow.snapshots.memory import MemoryPlace
from hybridflow.supervision import SUPERVISION
from hybridflow.waiting import CALLS
from hybridflow.whole_file import whole_file
from hybridflow.wording import kind_of
from recipes.asynchrony import rows_ahead
from recipes.environment import environment
from recipes.going_on import goes_on, start_step, start_tracker
from recipes.machines import connect_cluster, nodes_of, start_all_pools
from recipes.path_settings import make_directory
from recipes.placing import without_weights
from recipes.preparation import Preparation
from recipes.role_handles import spawn_roles, with_precision_of_machines
from recipes.roles import role_kind
from recipes.same_run import checkpoint_store, run_settings
from recipes.settings_history import CONFIG, other_settings, settings_tree, write_settings
from workers.agents.interfaces import environment_name
from workers.roles import (
    Actor,
    Cost,
    Critic,
    Generator,
    Policy,
    PreferenceModel,
    Reference,
    Reward,
    TrainedRole,
)
from workers.split_actor import SplitActor

if TYPE_CHECKING:
    from cluster.connect import ClusterInfo


class Session:
    """A run that is under way: its roles as attributes, and the loop's steps one at a time.

        session.actor.generate_sequences(next(session.prompts))     # typed as Actor.generate_sequences
        session.step()                                              # {"reward/mean": 0.5, ...}

    A process has one session at a time. The roles are those of the recipe; another one's name is an
    AttributeError that lists them.
    """

    actor: Actor
    critic: Critic
    cost_critic: Critic
    reference: Reference
    teacher: Reference
    reward: Reward
    gold: Reward
    judge: Reward
    cost: Cost
    policy: Policy
    reward_model: PreferenceModel
    generator: Generator

    def __init__(self, prepared: Preparation) -> None:
        """Starts everything and goes on from the checkpoint that loop.resume names; closes what
        was started where that fails."""
        _claim_process(self)
        self.prepared = prepared
        self.placement = prepared.placement
        self.config = prepared.config
        self.tokenizer = prepared.tokenizer
        self.directory = Path(self.config.output_dir).absolute()
        """output_dir: metrics, checkpoints, settings."""
        self.roles: dict[str, Any] = {}
        """Role -> its handle, placeholders included."""
        self.pools: dict[str, ResourcePool] = {}
        self.prompts: PromptStream
        """The stream of the steps' rows: next(session.prompts) is what the next step would
        begin with."""
        self.algorithm: Algorithm
        self._loop: Loop | None = None
        self._driver: Driver | None = None
        self._first_step = -1
        """The step that the tracker goes on behind; -1: none."""
        self._is_described = False
        """Whether config.yaml is that of this session."""
        self._resources = ExitStack()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def _draws_ahead(self) -> bool:
        """Whether responses are drawn ahead of the steps that train on them."""
        return self.config.asynchrony.staleness > 0

    @property
    def _placed(self) -> list[str]:
        """The roles of this run: those that stand somewhere, and no placeholders."""
        placed = {role.name for role in self.placement.roles}
        return [name for name in self.roles if name in placed]

    def _start(self) -> None:
        for line in without_weights(self.placement):
            raise ValueError(line)
        make_directory(self.directory, "output_dir")
        attempt = memory = tracker = None
        if self.config.algorithm.name not in QUESTIONS:
            attempt = self._claim_directory()
            if self.config.recovery.snapshot_every:
                memory = MemoryPlace.open(attempt)
        store = checkpoint_store(self.placement, self.directory, attempt)
        self._resources.enter_context(shown(live=self.config.metrics.console))
        with activity("start"):
            cluster = self._resources.enter_context(connect_cluster(self.placement))
            SUPERVISION.handle_signals()
            if attempt is not None:
                tracker = self._tracker(attempt, store, memory)
            self._start_roles(cluster)
        given_up = self._given_up()
        data = self._create_algorithm(given_up, trains=attempt is not None)
        if attempt is None or tracker is None:
            return
        if given_up is not None:
            self.algorithm = StepsOfEpisodes(self.algorithm, given_up)
        self._loop = self._create_loop(data, tracker, store, memory)
        nodes = nodes_of(cluster, self.pools, self.config.recovery.copies)
        self._loop.saving.nodes = self._resources.enter_context(nodes)
        self._resume(self._loop, tracker, attempt)
        self._driver = self._create_driver(self._loop, attempt)

    def _claim_directory(self) -> Attempt:
        """This process's attempt at the run in output_dir."""
        if not SUPERVISION.took_over:
            check_nobody_holds(self.directory)
        attempt = Attempt.claim(self.directory, after=SUPERVISION.state.get("attempt"))
        SUPERVISION.note(attempt=attempt.number)
        hold(attempt)
        self._resources.callback(release, attempt)
        return attempt

    def _tracker(
        self, attempt: Attempt, store: CheckpointStore, memory: MemoryPlace | None
    ) -> Tracker:
        """The metrics, behind the step that the run goes on from."""
        config = self.config
        length = config.loop.length(len(self.prepared.train), config.data.batch_size)
        self._first_step = start_step(goes_on(config.loop).resume, store, memory)
        if self._first_step < 0:
            attempt.check()
            self._describe(0)
        elif self._first_step > 0 and not SUPERVISION.took_over:
            differences = other_settings(config, self.directory, but=self.prepared.derived)
            if differences:
                LOGGER.warning(
                    "steps after %d are trained with other settings: %s",
                    self._first_step,
                    differences,
                )
        tracker = start_tracker(config, self.directory, self._first_step, length.num_steps, attempt)
        return self._resources.enter_context(tracker)

    def _start_roles(self, cluster: ClusterInfo | None) -> None:
        for name, pool in start_all_pools(self.placement, cluster).items():
            self.pools[name] = self._resources.enter_context(pool)
        prepared = with_precision_of_machines(self.prepared, self.pools, cluster)
        self.prepared, self.placement, self.config = prepared, prepared.placement, prepared.config
        if prepared.precision_line:
            LOGGER.info("%s", prepared.precision_line)
        self.roles = spawn_roles(self.placement, self.pools, draws_ahead=self._draws_ahead)

    def _create_algorithm(self, given_up: GivenUp | None, *, trains: bool) -> RowSource:
        """Roles, streams and the algorithm over them; returns the rows of its steps."""
        config, train = self.config, self.prepared.train
        roles = dict(self.roles)
        if given_up is not None and trains:
            roles = given_up.watched(roles)
        elif given_up is not None:
            roles["generator"] = CheckedGenerator(roles["generator"], given_up)
        vars(self).update({name: roles[name] for name in self._placed})
        data: RowSource = RowLoader(train, config.data)
        if self._draws_ahead:
            loader = RowLoader(train, config.data)
            data = rows_ahead(config, loader, self.roles["actor"], self.prepared.dataflow)
        texts = self.prepared.pretraining
        self.prompts = PromptStream(data, config.algorithm.samples_per_prompt)
        streams: dict[str, Stream] = {
            "prompts": self.prompts,
            "pretraining": TextStream(texts) if texts else EmptyStream(),
        }
        self.algorithm = create_algorithm(config.algorithm.name, roles, config.algorithm, streams)
        return data

    def _create_loop(
        self,
        data: RowSource,
        tracker: Tracker,
        store: CheckpointStore,
        memory: MemoryPlace | None,
    ) -> Loop:
        config, texts = self.config, self.prepared.pretraining
        return Loop(
            self.algorithm,
            trained=self._trained(),
            data=data,
            validate=self._validation(self.prepared.held_out),
            tracker=tracker,
            store=store,
            config=goes_on(config.loop),
            further={"pretraining": texts} if texts else {},
            samples=SampleReader(
                config.metrics.samples,
                self.tokenizer,
                seed=config.seed,
                end_token_ids=config.model.end_token_ids or (),
            ),
            settings=run_settings(self.placement),
            memory=memory,
            snapshot_every=config.recovery.snapshot_every,
        )

    def _create_driver(self, loop: Loop, attempt: Attempt) -> Driver:
        recovery, earlier = self.config.recovery, SUPERVISION.state
        recovers = recovery.max_restarts > 0
        return Driver(
            loop,
            pools=self.pools,
            rejoin=self._rejoin,
            config=recovery,
            events=EventLog(self.directory, attempt.number) if recovers else None,
            restarts=earlier.get("restarts", 0),
            furthest=earlier.get("furthest", -1),
            deterministic=self.config.deterministic,
            nodes=loop.saving.nodes,
        )

    def _trained(self) -> dict[str, TrainedRole]:
        trained = {}
        for role in self.placement.roles:
            if issubclass(role.worker, TrainedRole):
                trained[role.name] = self.roles[role.name]
        return trained

    def _resume(self, loop: Loop, tracker: Tracker, attempt: Attempt) -> None:
        """Brings the loop to where the run stands."""
        if not SUPERVISION.took_over:  # a full disk does not end a run that was under way
            loop.try_saving()
        loop.saving.begins_after = SUPERVISION.state.get("begins_after", 0)
        steps = logged_steps(self.directory)
        loop.trained_steps = [trained for trained in steps if trained.step <= self._first_step]
        missing = self._first_step - len(loop.trained_steps)
        if self.config.metrics.jsonl and self.config.loop.resume == "auto" and missing > 0:
            LOGGER.warning(
                "%s: %d of the %d steps so far are missing",
                self.directory / METRICS,
                missing,
                self._first_step,
            )
        loop.resume()
        if loop.step < self._first_step:  # the newest commit is damaged: its metrics go with it
            tracker.rewind(loop.step, attempt.number)
        is_new = not (self.directory / CONFIG).exists()
        if not self._is_described and (is_new or not loop.ends):
            self._describe(loop.step)
        SUPERVISION.note(begins_after=loop.saving.begins_after)

    def _describe(self, first_step: int) -> None:
        """Writes the settings and the machine of the steps after `first_step`. The files of a run that
        is finished stay as they are until it trains a step more."""
        self._is_described = True
        write_settings(self.directory, settings_tree(self.config), first_step)
        with whole_file(self.directory / "environment.json") as path:
            path.write_text(json.dumps(environment(), indent=1) + "\n")

    def _rejoin(self, restarted: set[str]) -> None:
        """Brings the actor's two pools together again after one of them was restarted."""
        actor = self.roles.get("actor")
        if isinstance(actor, SplitActor) and restarted & {pool.name for pool in actor.pools}:
            actor.join()

    def _validation(self, held_out: RowDataset | None) -> Validate | None:
        """The reward of responses where the rows are prompts, the algorithm's own numbers
        elsewhere."""
        if held_out is None:
            return None
        if not self.placement.entry.answers_prompts:
            return HeldOutRows(cast(Evaluated, self.algorithm).evaluate, held_out)
        actor, given_up = self.roles["actor"], self._given_up()
        if given_up is not None:
            actor = CheckedGenerator(actor, given_up)
        return ResponseReward(
            actor,
            self.reward,
            held_out,
            self.config.loop.validation_sampling,
            self.config.actor.generation.sampling.max_response_tokens,
            gold=self.roles.get("gold"),
        )

    def _given_up(self) -> GivenUp | None:
        """Counts groups of episodes that are given up, where responses are episodes."""
        if self.config.environment is None:
            return None
        return GivenUp(environment_name(self.config.environment), self.config.episode)

    @property
    def loop(self) -> Loop:
        """The loop over this session; a ValueError for recipes that train nothing."""
        if self._loop is None:
            raise ValueError(
                f"{self.config.algorithm.name} trains nothing, so its session has no steps"
            )
        if _OPEN is not self:
            raise ValueError("the session is closed; open another one")
        return self._loop

    def run(self) -> Outcome:
        """Every step to the end of the run, recovering from failures as recovery.* says."""
        assert self.loop and self._driver is not None, "a session with a loop has a driver"
        return self._driver.run()

    @property
    def num_steps(self) -> int:
        """Steps so far, those before a resume included."""
        return self.loop.step

    def step(self, prompts: Batch | None = None) -> dict[str, float]:
        """One step of the algorithm on the next prompts, or on these; returns when all of its
        calls have ended, with its metrics and seconds. A step that raises, or that Ctrl-C ends, used
        no rows: the next one begins with the same."""
        if prompts is not None and not isinstance(prompts, Batch):
            raise ValueError(
                f"session.step takes a Batch of prompts (next(session.prompts) is one), not "
                f"{kind_of(prompts)}"
            )
        if prompts is not None and not prompts:
            raise ValueError("session.step: the batch of prompts has no rows")
        if not self._is_described:
            self._describe(self.loop.step)
        return self.loop.train_one_step(prompts)

    def validate(self) -> dict[str, float]:
        """The validation's numbers, now; a ValueError without data.validation."""
        loop = self.loop
        if self.prepared.held_out is None:
            raise ValueError("data.validation is not set; name the held-out rows to validate on")
        return loop.validate()

    def save(self, directory: str | Path) -> None:
        """The trained model and its tokenizer as a Hugging Face directory; returns when every
        rank has written its part. A ValueError where `directory` can't be made."""
        self.loop.save_pretrained(make_directory(directory, "session.save"))

    def checkpoint(self) -> None:
        """Writes what a later session with the same output_dir goes on from (loop.resume=auto)."""
        self.loop.checkpoint()

    def wait(self) -> dict[str, float]:
        """Waits for every call under way; the seconds of each since the last step or wait, by
        role.method."""
        return phase_seconds(CALLS.finish())

    def close(self) -> None:
        """Ends pools, connections and files; called again it does nothing."""
        SUPERVISION.pause()
        CALLS.detach()
        try:
            self._resources.close()
        finally:
            _release_process(self)

    def __enter__(self) -> Session:
        if _OPEN is not self:
            raise ValueError("the session is closed; open another one")
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if _OPEN is self else ", closed"
        return f"Session({self.config.algorithm.name}: {', '.join(self._placed)}{state})"

    if not TYPE_CHECKING:  # for a type checker an unknown name is a mistake

        def __getattr__(self, name: str) -> NoReturn:
            if name in vars(self).get("roles", ()):
                raise AttributeError(
                    f"session: this run has no {name}, which nothing asks for; set "
                    f"{role_kind(name).asked_by(self.config)}"
                )
            roles = "none yet"
            if "roles" in vars(self):
                roles = ", ".join(self._placed) or roles
            raise AttributeError(f"session: no {name!r}; the roles of this recipe are {roles}")


LOGGER = logging.getLogger(__name__)
_OPEN: Session | None = None
"""The session of this process; calls and their seconds are counted per process."""


def _claim_process(session: Session) -> None:
    global _OPEN
    if _OPEN is not None:
        raise ValueError(
            f"{_OPEN} is open in this process; close it first: session.close(), or "
            "hybridflow.current_session().close()"
        )
    _OPEN = session


def _release_process(session: Session) -> None:
    global _OPEN
    if _OPEN is session:
        _OPEN = None


def current_session() -> Session | None:
    """The session that is open in this process, for whoever lost hold of it."""
    return _OPEN
