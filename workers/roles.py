"""The roles as algorithms see them: which methods there are, how each is called, what it reads and
writes.

Controllers are written against these classes; workers/actor.py and its neighbours implement them
over the engines.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

from hybridflow.batch import Batch
from hybridflow.dataflow import CallKind
from hybridflow.protocols import ONE_TO_ALL, THREE_D, THREE_D_ALL_MICRO_DP
from hybridflow.results import Metrics
from hybridflow.snapshots.files import Written
from hybridflow.snapshots.flush import Flushed
from hybridflow.snapshots.reading import Check
from hybridflow.worker import Worker, remote
from workers import columns as columns  # declares every column named below
from workers.generation.config import SamplingConfig
from workers.losses.config import DPOLossConfig

TO_ALL_GENERATORS = replace(ONE_TO_ALL, name="TO_ALL_GENERATORS", layout="generation")
TO_REPLICAS = replace(
    THREE_D_ALL_MICRO_DP, name="TO_REPLICAS", collect=ONE_TO_ALL.collect, every_rank=True
)
OF_REPLICAS = replace(
    TO_ALL_GENERATORS, name="OF_REPLICAS", collected=THREE_D_ALL_MICRO_DP.collected
)


class TrainedRole(Worker):
    """A role that is trained: its checkpoints and weights, for the loop."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def save_checkpoint(self, directory: str) -> None:
        """Writes everything that training goes on from: a file of each rank
        (hybridflow/snapshots)."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def try_checkpoint(self, directory: str) -> str:
        """save_checkpoint for a run that goes on where the disk is full: the answer is what the
        disk refused, empty where it took all."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def load_checkpoint(self, directory: str, stamp: str | None = None) -> None:
        """Reads what save_checkpoint wrote, on this layout or another. The next use of the weights
        elsewhere (generation) is preceded by a forced sync. `stamp`: of the snapshot that the
        files must belong to."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def stage_snapshot(self, directory: str, stamp: str, keep: tuple[str, ...]) -> Written:
        """Writes this rank's file of DIRECTORY/ROLE into the node's memory, over a file of the same
        rank that is in none of the directories `keep` (hybridflow/snapshots/memory.py). An answer
        with an error where memory is short."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def flush_snapshot(self, directory: str) -> None:
        """Begins to copy the file that was staged last to DIRECTORY/ROLE on disk; returns at once.
        A copy that is under way is given up."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def flush_result(self, wait: bool) -> tuple[Flushed, ...]:
        """The end of that copy; nothing while it is under way."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def check_snapshot(self, directory: str, stamp: str) -> Check:
        """Whether this rank can load the snapshot, and why not. The ranks of a node verify
        the digests of the node's files together."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def drop_snapshots(self) -> None:
        """Frees what is staged in memory."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def save_pretrained(self, directory: str) -> None:
        """Writes weights and tokenizer as a Hugging Face directory."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def export_model(self, directory: str) -> str:
        """save_pretrained for a run that goes on where the disk is full: the answer is what the
        disk refused, empty where it took all."""

    @remote(ONE_TO_ALL)
    def try_saving(self, directory: str) -> int:
        """Does, small, what save_checkpoint and save_pretrained do; returns the bytes that they
        would write. A role that does not try says 0."""
        del directory
        return 0

    @remote(ONE_TO_ALL)
    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """The peak memory of each rank's process so far; on a GPU the most that was in use on its
        device at the end of a call, by whomever."""


class Policy(TrainedRole):
    """A language model that is trained on given rows: demonstrations, pairs, a teacher's
    log-probs."""

    @remote(
        THREE_D,
        reads=("prompt_ids", "response_ids"),
        optional=("loss_mask", "segment_lengths", "images"),
        writes=("log_probs",),
        balance="num_tokens",
        near="uid",
    )
    @abstractmethod
    def compute_log_prob(self, batch: Batch) -> Batch:
        """Log-probs of the responses under the training engine, at the sampling temperature."""

    @remote(
        THREE_D,
        reads=("prompt_ids", "response_ids"),
        optional=("loss_mask", "segment_lengths", "images", "mini_batch"),
        kind=CallKind.training,
        balance="num_tokens",
        near="uid",
        within="mini_batch",
    )
    @abstractmethod
    def update_supervised(self, batch: Batch) -> Metrics:
        """Cross-entropy of the responses (of the tokens in loss_mask): one optimizer step for every
        mini-batch and epoch."""

    @remote(
        THREE_D,
        reads=("prompt_ids", "response_ids", "ref_log_probs", "pair", "chosen"),
        optional=(
            "loss_mask",
            "segment_lengths",
            "images",
            "mini_batch",
        ),
        kind=CallKind.training,
        balance="num_tokens",
        near="uid",
        within="mini_batch",
        together="pair",
    )
    @abstractmethod
    def update_dpo(self, batch: Batch, loss: DPOLossConfig) -> Metrics:
        """DPO on pairs of rows: one optimizer step for every mini-batch and epoch."""

    @remote(
        THREE_D,
        reads=("prompt_ids", "response_ids", "teacher_log_probs"),
        optional=(
            "loss_mask",
            "segment_lengths",
            "images",
            "mini_batch",
        ),
        kind=CallKind.training,
        balance="num_tokens",
        near="uid",
        within="mini_batch",
    )
    @abstractmethod
    def update_distilled(self, batch: Batch) -> Metrics:
        """Reverse KL to the teacher on the responses: one optimizer step for every mini-batch
        and epoch."""


class TrainingActor(Policy):
    """The half of the actor that trains: a policy with the policy-gradient update."""

    @remote(
        THREE_D,
        reads=("prompt_ids", "response_ids", "advantages"),
        optional=(
            "loss_mask",
            "segment_lengths",
            "images",
            "rollout_log_probs",
            "log_probs",
            "ref_log_probs",
            "mini_batch",
            "weight_version",
            "covariance_selected",
            "pretrain",
            "routes",
        ),
        kind=CallKind.training,
        balance="num_tokens",
        near="uid",
        within="mini_batch",
    )
    @abstractmethod
    def update_actor(self, batch: Batch) -> Metrics:
        """One optimizer step for every mini-batch and epoch."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def current_version(self) -> int:
        """The version of the weights: the number of updates that made them."""


class Generator(Worker):
    """A language model that generates: the other half of the actor, or a model that is
    evaluated."""

    @remote(
        THREE_D_ALL_MICRO_DP,
        reads=("prompt_ids", "uid"),
        optional=("sample", "max_response_tokens", "images"),
        writes=(
            "response_ids",
            "rollout_log_probs",
            "finish_reason",
            "num_tokens",
            "weight_version",
        ),
        kind=CallKind.generation,
    )
    @abstractmethod
    def generate_sequences(
        self, prompts: Batch, sampling: SamplingConfig | None = None, *, do_sample: bool = True
    ) -> Batch:
        """One response for every row, by the generation engine under the actor's latest weights.

        sampling: None for the configured one. do_sample: False takes the most likely token, all
        else as configured.
        """


class RowName(NamedTuple):
    """A row of a step: RowName(uid=7, sample=0)"""

    uid: int
    sample: int
    greedy: bool = False
    """It takes the most likely tokens."""


class EndedRow(NamedTuple):
    """EndedRow(RowName(7, 0), first=3, last=4)"""

    name: RowName
    first: int
    """The version of the weights that drew the first token."""
    last: int
    """The version of those that drew the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The answer of a replica to a slice of generation:

    Progress(finished=(EndedRow(RowName(7, 0), 3, 4),), num_steps=16, seconds=0.4)
    """

    finished: tuple[EndedRow, ...]
    """The rows that ended since the last slice."""
    num_steps: int
    """Engine steps of the slice."""
    seconds: float


class StreamingGenerator(Generator):
    """A generator whose rows are drawn in slices, between which other calls come: rows in flight
    stay where they are."""

    @remote(
        TO_REPLICAS,
        reads=("prompt_ids", "uid", "sample", "replica"),
        optional=("max_response_tokens", "images"),
        part="replica",
    )
    @abstractmethod
    def submit(self, prompts: Batch, *, do_sample: bool = True) -> None:
        """Adds rows, to be drawn with the configured sampling settings; do_sample as in
        generate_sequences."""

    @remote(OF_REPLICAS, kind=CallKind.generation)
    @abstractmethod
    def advance(self, limit: int) -> Progress:
        """At most `limit` engine steps, under the weights that the engine then has; an answer of
        each replica."""

    @remote(
        THREE_D_ALL_MICRO_DP,
        reads=("uid", "sample", "replica"),
        writes=(
            "response_ids",
            "rollout_log_probs",
            "finish_reason",
            "num_tokens",
            "weight_version",
            "token_version",
        ),
        part="replica",
    )
    @abstractmethod
    def collect(self, rows: Batch, *, do_sample: bool = True) -> Batch:
        """The responses of rows that were submitted so and ended, which the generator then
        forgets."""

    @remote(TO_ALL_GENERATORS)
    @abstractmethod
    def discard(self) -> None:
        """Forgets all rows, in flight or ended."""


class Actor(TrainingActor, Generator):
    """A policy that also generates. A worker has both halves, or each half has a pool of its own
    (workers/split_actor.py)."""


class SplitTrainer(TrainingActor):
    """The training half in a pool of its own."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def open_meeting(self, host: str, num_ranks: int) -> str:
        """Where the ranks of both pools find each other: rank 0 listens on `host`, the others
        return ""."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def join(self, meeting: str, num_ranks: int, host: str, timeout_s: float) -> None:
        """Enters the group of both pools; started on both sides before either is waited for.
        host "": this machine's address. `timeout_s`: of the group's operations."""

    @remote(ONE_TO_ALL)
    @abstractmethod
    def sync_weights(self) -> dict[str, float]:
        """Sends the weights; started on both sides before either is waited for. Metrics of each
        rank."""


class SplitGenerator(StreamingGenerator):
    """The generation half in a pool of its own."""

    @remote(TO_ALL_GENERATORS)
    @abstractmethod
    def join(self, meeting: str, num_ranks: int, host: str, timeout_s: float) -> None:
        """See SplitTrainer.join."""

    @remote(TO_ALL_GENERATORS)
    @abstractmethod
    def sync_weights(self) -> dict[str, float]:
        """Receives the weights and checks them; see SplitTrainer.sync_weights."""


class Critic(TrainedRole):
    """The value model."""

    @remote(
        THREE_D,
        reads=("prompt_ids", "response_ids"),
        optional=("loss_mask", "segment_lengths", "images"),
        writes=("values",),
        balance="num_tokens",
        near="uid",
    )
    @abstractmethod
    def compute_values(self, batch: Batch) -> Batch:
        """The value of the state before every response token."""

    @remote(
        THREE_D,
        reads=("prompt_ids", "response_ids", "returns"),
        optional=("loss_mask", "segment_lengths", "images", "values", "mini_batch"),
        kind=CallKind.training,
        balance="num_tokens",
        near="uid",
        within="mini_batch",
    )
    @abstractmethod
    def update_critic(self, batch: Batch) -> Metrics:
        """One optimizer step for every mini-batch and epoch."""


class Reference(Worker):
    """The frozen policy that the KL divergence is taken to."""

    @remote(
        THREE_D,
        reads=("prompt_ids", "response_ids"),
        optional=("loss_mask", "segment_lengths", "images"),
        writes=("ref_log_probs",),
        balance="num_tokens",
        near="uid",
    )
    @abstractmethod
    def compute_ref_log_prob(self, batch: Batch) -> Batch:
        """Log-probs of the responses under the reference, at the sampling temperature."""


class PreferenceModel(TrainedRole):
    """A reward or cost model in training."""

    @remote(
        THREE_D,
        reads=("prompt_ids", "response_ids"),
        optional=("images",),
        writes=("scores",),
        balance="num_tokens",
        near="uid",
    )
    @abstractmethod
    def compute_scores(self, batch: Batch) -> Batch:
        """One score for every response."""

    @remote(
        THREE_D,
        reads=("prompt_ids", "response_ids", "pair", "chosen"),
        optional=("mini_batch", "images"),
        kind=CallKind.training,
        balance="num_tokens",
        near="uid",
        within="mini_batch",
        together="pair",
    )
    @abstractmethod
    def update_preferences(self, batch: Batch) -> Metrics:
        """Bradley-Terry: the chosen row's score above the rejected one's; one optimizer step
        for every mini-batch."""

    @remote(
        THREE_D,
        reads=("prompt_ids", "response_ids", "pair", "chosen", "harm_sign"),
        optional=("mini_batch", "images"),
        kind=CallKind.training,
        balance="num_tokens",
        near="uid",
        within="mini_batch",
        together="pair",
    )
    @abstractmethod
    def update_costs(self, batch: Batch) -> Metrics:
        """Bradley-Terry on costs, where the chosen row is the more harmful of a pair; a cost's
        sign tells unsafe from safe."""


class Reward(Worker):
    """The reward that the policy is trained to increase: a Python function or a model."""

    @remote(
        THREE_D,
        reads=("prompt_ids", "response_ids", "finish_reason"),
        optional=("extras", "images"),
        writes=("rewards", "reward_metrics"),
        balance="num_tokens",
        near="uid",
    )
    @abstractmethod
    def compute_reward(self, batch: Batch) -> Batch:
        """One reward for every response, and the function's further numbers."""


class Cost(Worker):
    """The cost that the policy must keep under a limit (Safe-RLHF): a Python function, or a
    cost model, for which a response is harmful above 0."""

    @remote(
        THREE_D,
        reads=("prompt_ids", "response_ids", "finish_reason"),
        optional=("extras", "images"),
        writes=("costs", "cost_metrics"),
        balance="num_tokens",
        near="uid",
    )
    @abstractmethod
    def compute_cost(self, batch: Batch) -> Batch:
        """One cost for every response, and the function's further numbers."""
