"""Tokens that an environment wrote between the policy's: no algorithm sees them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from controllers import ALGORITHMS, create_algorithm
from controllers.kl import KLEstimator
from controllers.rewards import rewards_with_kl
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from tests.controllers.fakes import FakeActor, Script, fakes, prompts, streams
from tests.controllers.test_algorithms import KNOWN, LEARNABLE
from workers.generation.config import SamplingConfig


@dataclass
class Inserting(FakeActor):
    """An actor whose environment writes tokens at random places behind the first sampled one."""

    inner: FakeActor
    drawn: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __post_init__(self) -> None:
        super().__init__(self.inner.role, self.inner.log, self.inner.script)

    def generate_sequences(
        self, prompts: Batch, sampling: SamplingConfig | None = None, *, do_sample: bool = True
    ) -> Batch:
        batch = super().generate_sequences(prompts, sampling, do_sample=do_sample)
        ids, masks, counts = [], [], []
        for row in batch.ragged("response_ids").unbind():
            sampled, mask = row.tolist(), [True] * len(row)
            for _ in range(self.drawn.integers(0, 5)):
                place = int(self.drawn.integers(1, len(sampled) + 1))
                sampled.insert(place, int(self.drawn.integers(50, 90)))
                mask.insert(place, False)
            ids.append(sampled)
            masks.append(mask)
            counts.append(len(row))
        responses = Ragged.of(ids)
        columns = {name: batch[name] for name in ("rollout_log_probs", "weight_version")}
        return Batch.of(
            response_ids=responses,
            loss_mask=Ragged.of(masks, torch.bool),
            num_sampled=torch.tensor(counts),
            num_tokens=prompts.ragged("prompt_ids").lengths + responses.lengths,
            finish_reason=batch.objects("finish_reason"),
            **columns,
        )


@pytest.mark.parametrize("name", KNOWN)
def test_inserted_tokens_change_nothing_that_is_learned(name: str) -> None:
    """Whatever an environment inserts: the factors of the losses are those of the row without
    it."""
    updates = []
    # Pairs are scored in an order of their own, which a script by rows doesn't fit.
    script = replace(SCRIPT, ref_log_probs=[]) if name == "online_dpo" else SCRIPT
    for inserts in (False, True):
        roles, log = fakes(script)
        if inserts:
            roles["actor"] = Inserting(roles["actor"])
        extra = {"k": 2} if name == "pass_at_k" else {}
        config = ALGORITHMS[name].load_config()(samples_per_prompt=2, **extra)
        algorithm = create_algorithm(name, roles, config, streams())
        metrics = dict(algorithm.step(prompts([7, 7, 9, 9])))
        updates.append((log, metrics))
    (plain, plain_metrics), (inserted, inserted_metrics) = updates
    assert plain.names == inserted.names
    for one, other in zip(plain, inserted, strict=True):
        for column in ("advantages", "returns", "ref_log_probs", "teacher_log_probs"):
            if column in one.batch:
                expected, got = one.batch.ragged(column), other.batch.ragged(column)
                assert torch.equal(got.values, expected.values), column
                assert torch.equal(got.lengths, expected.lengths), column
    plain_update, update = plain[-1].batch, inserted[-1].batch
    counts = [int(row.sum()) for row in update.ragged("loss_mask").unbind()]
    assert counts == plain_update.ragged("response_ids").lengths.tolist()
    sampled = update.ragged("response_ids").values[update.ragged("loss_mask").values]
    assert torch.equal(sampled, plain_update.ragged("response_ids").values)
    assert inserted_metrics.pop("tokens") > plain_metrics.pop("tokens"), "the cost of the rows"
    assert inserted_metrics == plain_metrics


def test_rewards_of_turns_stand_at_their_ends() -> None:
    """Row 0 has turns of 2 and 1 sampled tokens that earned 0.5 and 1.0 of its reward 2.0; row 1 one
    turn without a reward of its own."""
    batch = Batch.of(
        rewards=torch.tensor([2.0, -1.0]),
        rollout_log_probs=Ragged.of([[-1.0, -2.0, -3.0], [-4.0]]),
        turn_lengths=Ragged.of([[2, 1], [1]]),
        turn_rewards=Ragged.of([[0.5, 1.0], [0.0]]),
    )
    rewards, lengths = rewards_with_kl(batch, 0.0, KLEstimator.k1)
    assert rewards.tolist() == [0.0, 0.5, 1.5, -1.0]
    assert lengths.tolist() == [3, 1]
    with_reference = batch | Batch.of(ref_log_probs=Ragged.of([[-1.5, -2.0, -3.0], [-4.0]]))
    rewards, _ = rewards_with_kl(with_reference, 0.1, KLEstimator.k1)
    assert rewards.tolist() == pytest.approx([-0.05, 0.5, 1.5, -1.0])


SCRIPT = Script(
    responses=LEARNABLE.responses,
    rewards=LEARNABLE.rewards,
    values=[[0.5, 1.0], [0.25], [0.75], [0.1, 0.2, 0.3]],
    log_probs=[[-1.0, -2.0], [-0.5], [-0.25], [-0.5, -1.0, -1.5]],
    ref_log_probs=[[-1.5, -1.0], [-0.5], [-0.75], [-1.0, -1.0, -1.0]],
)
