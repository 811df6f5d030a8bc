"""Losses on pairs and on masked tokens do not depend on how the work is cut: one rank or two,
large or small micro-batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.context import RankContext
from hybridflow.protocols import Split, cut_rows
from tests.ranks import run_ranks
from tests.tiny import VOCAB, make_model
from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.losses.config import DPOLossConfig
from workers.policy import PolicyWorker
from workers.preference import PreferenceWorker
from workers.role_config import PolicyConfig, PreferenceConfig

NUM_PAIRS = 7
SPLIT = Split(balance="num_tokens", within="mini_batch", together="pair")
CASES = [(2, 64), (1, 10_000), (1, 1)]
"""(ranks, micro-batch tokens); with a budget of one token every pair is a micro-batch of its
own."""


def rows() -> Batch:
    """Pairs of uneven lengths in two mini-batches, with a mask and reference log-probs."""
    drawn = np.random.default_rng(0)
    prompts = [
        drawn.integers(3, VOCAB, drawn.integers(1, 9)) for _ in range(NUM_PAIRS) for _ in (0, 1)
    ]
    responses = [drawn.integers(3, VOCAB, drawn.integers(2, 12)) for _ in range(2 * NUM_PAIRS)]
    lengths = torch.tensor([len(response) for response in responses])
    mask = Ragged(torch.from_numpy(drawn.random(int(lengths.sum())) < 0.6), lengths)
    counts = torch.tensor([int(row.sum()) for row in mask.unbind()])
    scored = torch.from_numpy(drawn.normal(-4.8, 0.1, int(counts.sum()))).float()
    return Batch.of(
        prompt_ids=Ragged.of(prompts),
        response_ids=Ragged.of(responses),
        num_tokens=torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]),
        ref_log_probs=Ragged(scored, counts),
        loss_mask=mask,
        pair=torch.arange(NUM_PAIRS).repeat_interleave(2),
        chosen=torch.tensor([True, False] * NUM_PAIRS),
        harm_sign=torch.from_numpy(drawn.choice([-1.0, 1.0], 2 * NUM_PAIRS)).float(),
        mini_batch=(torch.arange(NUM_PAIRS) % 2).repeat_interleave(2),
    )


def train(root: Path, rank: int, world_size: int, tokens: int) -> dict[str, Any]:
    """Every update once, each by a model of its own: its metrics and its weights after it."""
    batch = rows()
    own = batch.rows(cut_rows(batch, world_size, SPLIT)[rank]) if world_size > 1 else batch
    context = RankContext(rank=rank, world_size=world_size, local_rank=rank)
    optimizer = OptimizerConfig(learning_rate=1e-3)
    settings = TrainConfig(precision=Precision.fp32, micro_batch_tokens=tokens, optimizer=optimizer)
    policy = PolicyConfig(model=ModelConfig(path=str(root / "model")), train=settings)
    scorer = PreferenceConfig(
        model=ModelConfig(path=str(root / "model"), new_head=True), train=settings
    )
    results: dict[str, Any] = {}
    whole = own.select(*(name for name in own.columns if name != "loss_mask"))
    for name, update in {
        "supervised": lambda: PolicyWorker(policy, context).update_supervised(own),
        "distilled": lambda: PolicyWorker(policy, context).update_distilled(
            own.rename(ref_log_probs="teacher_log_probs")
        ),
        "dpo": lambda: PolicyWorker(policy, context).update_dpo(own, DPOLossConfig(beta=0.5)),
        "preferences": lambda: PreferenceWorker(scorer, context).update_preferences(whole),
        "costs": lambda: PreferenceWorker(scorer, context).update_costs(whole),
    }.items():
        results[name] = dict(update())
    return results


def run_worlds(rank: int, root: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    for number, (world_size, tokens) in enumerate(CASES):
        if rank < world_size:
            dist.init_process_group(
                "gloo", init_method=f"file://{root}/store{number}", rank=rank, world_size=world_size
            )
            torch.save(train(root, rank, world_size, tokens), root / f"{number}.{rank}.pt")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("pairs") / "model", layers=1)


@pytest.fixture(scope="module")
def results(model: Path) -> list[dict[str, Any]]:
    root = model.parent
    run_ranks(run_worlds, (root,), 2)
    return [torch.load(root / f"{number}.0.pt") for number in range(len(CASES))]


@pytest.mark.parametrize("update", ["supervised", "distilled", "dpo", "preferences", "costs"])
def test_metrics_do_not_depend_on_the_cut(results: list[dict[str, Any]], update: str) -> None:
    whole = results[1][update]
    assert whole[next(name for name in whole if name.endswith("/loss"))] != 0
    for other in (results[0][update], results[2][update]):
        for name, value in whole.items():
            if "/memory/" in name:  # of the process, not of the update
                continue
            assert other[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


def test_the_second_step_of_a_distillation_weighs_by_the_ratio(
    results: list[dict[str, Any]], model: Path
) -> None:
    """The samples are those of the policy before the update: plain PyTorch, two mini-batches,
    sg[log pi - log teacher] pi / pi_old."""
    batch = rows()
    policy = AutoModelForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )

    def log_probs(row: int) -> torch.Tensor:
        asked, answered = (
            batch.ragged(name).unbind()[row] for name in ("prompt_ids", "response_ids")
        )
        logits = policy(torch.cat([asked, answered])[None]).logits[0, len(asked) - 1 : -1]
        scored = torch.log_softmax(logits, -1).gather(1, answered[:, None]).squeeze(1)
        return scored[batch.ragged("loss_mask").unbind()[row]]

    with torch.no_grad():
        old = [log_probs(row) for row in range(len(batch))]
    losses = []
    for step in (0, 1):
        chosen = torch.nonzero(batch.tensor("mini_batch") == step).squeeze(1).tolist()
        current = torch.cat([log_probs(row) for row in chosen])
        teacher = torch.cat([batch.ragged("ref_log_probs").unbind()[row] for row in chosen])
        ratio = (current - torch.cat([old[row] for row in chosen])).exp()
        loss = ((current - teacher).detach() * ratio).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] != pytest.approx(float((current - teacher).detach().mean()), rel=1e-3), (
        "the ratio is not 1 any more"
    )
    assert results[1]["distilled"]["policy/distillation_loss"] == pytest.approx(
        sum(losses) / 2, rel=1e-4
    )


def test_pairs_stay_together_and_ranks_get_equal_work() -> None:
    batch = rows()
    parts = cut_rows(batch, 3, SPLIT)
    assert sorted(np.concatenate(parts).tolist()) == list(range(2 * NUM_PAIRS))
    pair, tokens = batch.tensor("pair").numpy(), batch.tensor("num_tokens").numpy()
    owners = [
        {rank for rank, part in enumerate(parts) if number in pair[part]}
        for number in range(NUM_PAIRS)
    ]
    assert all(len(owner) == 1 for owner in owners)
    assert max(tokens[part].sum() for part in parts) < 2 * min(tokens[part].sum() for part in parts)
    with pytest.raises(ValueError, match="rows with one pair must have one mini_batch"):
        cut_rows(
            batch.drop("mini_batch") | Batch.of(mini_batch=torch.arange(2 * NUM_PAIRS)), 2, SPLIT
        )
