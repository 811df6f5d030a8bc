"""The draws follow the softmax (cut by the filters), depend on seed and position only, and
carry the trainer's log-probs."""

import math

import pytest
import torch

from workers.generation.config import SamplingConfig
from workers.generation.draws import GOLDEN, gumbel, mix, sample_tokens

VOCAB = 50  # blocks of 8, the last one of 2
DRAWS = 40_000


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def draw(
    logits: torch.Tensor, sampling: SamplingConfig, *, first_seed: int = 0, position: int = 0
) -> torch.Tensor:
    seeds = torch.arange(first_seed, first_seed + DRAWS)
    return sample_tokens(
        logits.expand(DRAWS, -1), seeds, torch.full_like(seeds, position), sampling
    )[0]


def naive_distribution(logits: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """min_p, then top_k, then top_p on what is left, one token after the other from the most
    likely one."""
    probabilities = (logits.double() / sampling.temperature).softmax(dim=-1).tolist()
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    order = [
        token for token in order if probabilities[token] >= sampling.min_p * probabilities[order[0]]
    ]
    if sampling.top_k:
        order = order[: sampling.top_k]
    total, kept, mass = sum(probabilities[token] for token in order), [], 0.0
    for token in order:
        if mass < sampling.top_p * total:
            kept.append(token)
            mass += probabilities[token]
    result = torch.zeros(len(probabilities), dtype=torch.float64)
    for token in kept:
        result[token] = probabilities[token] / mass
    return result


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.6),
        SamplingConfig(top_p=0.7),
        SamplingConfig(top_p=0.05),
        SamplingConfig(top_k=5),
        SamplingConfig(min_p=0.1),
        SamplingConfig(temperature=1.5, top_k=20, top_p=0.8, min_p=0.02),
    ],
    ids=str,
)
def test_draws_follow_the_filtered_softmax(logits: torch.Tensor, sampling: SamplingConfig) -> None:
    expected = naive_distribution(logits, sampling)
    seen = draw(logits, sampling).bincount(minlength=VOCAB).double()
    assert not seen[expected == 0].any()
    deviation = (seen - DRAWS * expected) / (DRAWS * expected * (1 - expected)).sqrt().clamp(min=1)
    assert deviation.abs().max() < 4.5


def test_large_vocabulary_is_reached_evenly() -> None:
    # Equal logits: every token once in 1,000 draws; blocks and the noise inside them show as a
    # pattern if they are dependent.
    seen = draw(torch.zeros(1000), SamplingConfig()).bincount(minlength=1000).double()
    chi_square = ((seen - DRAWS / 1000) ** 2 / (DRAWS / 1000)).sum()
    assert abs(chi_square - 999) < 5 * math.sqrt(2 * 999)


@pytest.mark.parametrize(("first_seed", "position"), [(0, 1), (1, 0), (1 << 32, 0), (0, 2048)])
def test_other_position_or_seed_is_independent(
    logits: torch.Tensor, first_seed: int, position: int
) -> None:
    flat = logits[:6] / 4
    one = draw(flat, SamplingConfig())
    other = draw(flat, SamplingConfig(), first_seed=first_seed, position=position)
    probabilities = flat.double().softmax(dim=-1)
    expected = DRAWS * probabilities[:, None] * probabilities[None, :]
    seen = (one * 6 + other).bincount(minlength=36).double().view(6, 6)
    assert ((seen - expected) ** 2 / expected).sum() < 35 + 5 * math.sqrt(2 * 35)


def test_log_probs_are_of_the_full_softmax_at_the_temperature(logits: torch.Tensor) -> None:
    rows = torch.randn(64, VOCAB) * 3
    seeds = torch.arange(64)
    for sampling in (
        SamplingConfig(temperature=0.5, top_p=0.6, top_k=9, min_p=0.01),
        SamplingConfig(greedy=True, temperature=0.5),
    ):
        ids, log_probs = sample_tokens(rows, seeds, seeds, sampling)
        expected = (
            (rows / (1.0 if sampling.greedy else 0.5))
            .log_softmax(dim=-1)
            .gather(-1, ids[:, None])[:, 0]
        )
        torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, rows.argmax(dim=-1))


def test_a_row_does_not_depend_on_the_others_nor_on_a_little_noise(logits: torch.Tensor) -> None:
    rows = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    seeds, positions = torch.arange(512) * 3, torch.arange(512) % 7
    state = torch.get_rng_state()
    ids, _ = sample_tokens(rows, seeds, positions, SamplingConfig())
    shuffled = torch.randperm(512)
    again, _ = sample_tokens(
        (rows * (1 + 1e-6))[shuffled], seeds[shuffled], positions[shuffled], SamplingConfig()
    )
    assert torch.equal(ids[shuffled], again)
    torch.set_rng_state(state)
    sample_tokens(rows, seeds, positions, SamplingConfig(top_p=0.9))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_masked_token_is_never_drawn() -> None:
    masked = torch.full((VOCAB,), -math.inf)
    masked[[7, 49]] = torch.tensor([100.0, 100.0])
    assert set(draw(masked, SamplingConfig()).tolist()) == {7, 49}


def test_noise_is_splitmix64_and_standard_gumbel() -> None:
    known = torch.tensor([6457827717110365317, 3203168211198807973, 9817491932198370423 - 2**64])
    assert torch.equal(mix(1234567 + torch.arange(1, 4) * (GOLDEN - 2**64)), known)
    noise = gumbel(torch.arange(1000), 64)
    assert abs(noise.mean() - 0.5772) < 0.03
    assert abs(noise.var() - math.pi**2 / 6) < 0.06
