"""The case that benchmarks.invariance runs: a tiny model, prompts, a reward function that writes
down its input, and settings.

Everything is in float32, with learning rates and clip ranges that make two optimizer steps on one
batch differ: the second step's ratios are not 1, some of them clipped, and values have moved away
from the rollout's.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

VOCABULARY, EOS, END = 64, 1, "<end>"
NUM_PROMPTS = 7
"""A number that no number of ranks or samples divides."""
RESPONSE_TOKENS = 10
LEARNING_RATE, EPSILON, WEIGHT_DECAY, CLIP_GRAD_NORM = 1e-3, 1e-4, 0.1, 0.5
"""AdamW's epsilon is large: with 1e-8 a gradient that is rounding noise makes a whole step, and
no two summation orders agree."""
NUM_EPOCHS = 2
CLIP = 0.05
KL, GAMMA, LAMBDA = 0.1, 0.99, 0.9
ENTROPY = 0.01
VALUE_CLIP = 0.05
MULTIPLIER, MULTIPLIER_RATE, COST_THRESHOLD = 0.8, 0.1, 0.2
PRETRAINING, NUM_TEXTS = 0.5, 5
SAMPLES_PER_PROMPT = {"ppo": 2, "grpo": 4, "gspo": 4, "safe_rlhf": 2}
TRAINED = {
    "ppo": ("actor", "critic"),
    "grpo": ("actor",),
    "gspo": ("actor",),
    "safe_rlhf": ("actor", "critic", "cost_critic"),
}
"""Roles that learn; the reference has weights too."""
STARTS = {"actor": "policy", "critic": "critic", "cost_critic": "cost_critic"}
"""Their folders."""


def make_case(directory: Path) -> None:
    """directory/policy, reference (another model, so that the KL is not 0), critic,
    cost_critic, tokenizer, texts.jsonl."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=False,
    )
    vocabulary = {f"w{i}": i for i in range(VOCABULARY) if i != EOS}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, END: EOS}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Only the end is special: every other token of a response is in the text that the reward
    # function gets. In a folder of its own: beside a Qwen2 model AutoTokenizer would make a
    # Qwen2Tokenizer of it.
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(
        directory / "tokenizer"
    )
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(directory / name)
    config.num_labels = 1
    for seed, name in enumerate(("critic", "cost_critic"), start=2):
        torch.manual_seed(seed)
        Qwen2ForSequenceClassification(config).save_pretrained(directory / name)
    lines = []
    for number in range(NUM_TEXTS):
        words = [f"w{(number * number + 5 * place) % 60 + 3}" for place in range(4 + 3 * number)]
        lines.append(json.dumps({"text": " ".join(words)}) + "\n")
    (directory / "texts.jsonl").write_text("".join(lines))


def prompts(directory: Path, rollouts: Path) -> Path:
    """The prompts, each row with the file that the reward function writes to."""
    generator = np.random.default_rng(0)
    path = directory / "prompts.jsonl"
    rows = []
    for number in range(NUM_PROMPTS):
        words = " ".join(
            f"w{word}" for word in generator.integers(3, VOCABULARY, generator.integers(2, 12))
        )
        rows.append({"prompt": words, "answer": str(number), "rollouts": str(rollouts)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def record(
    *,
    prompt: str,
    response: str,
    finish_reason: str,
    answer: str,
    rollouts: str,
    **_columns: object,
) -> float:
    """The reward, a number between 0 and 1 that any change of a response changes; the row goes
    into the file `rollouts`."""
    tokens = numbers(response) + ([EOS] if finish_reason == "stop" else [])
    reward = sum((place + 1) * token for place, token in enumerate(tokens)) % 17 / 16
    row = {"number": int(answer), "prompt": numbers(prompt), "response": tokens, "reward": reward}
    with Path(rollouts).open("a") as file:
        # One write: rows of several processes do not mix.
        file.write(json.dumps(row) + "\n")
    return reward


def cost(*, response: str, finish_reason: str, **_columns: object) -> float:
    """Safe-RLHF's cost, between 0 and 1."""
    return cost_of(numbers(response) + ([EOS] if finish_reason == "stop" else []))


def cost_of(tokens: list[int]) -> float:
    return sum((place + 2) * token for place, token in enumerate(tokens)) % 13 / 12


def numbers(text: str) -> list[int]:
    """The tokens of "w12 w7"."""
    return [int(word[1:]) for word in text.split()]


def settings(algorithm: str, case: Path, output: Path) -> list[str]:
    """The command line of one step of `algorithm`, without engine, layout, micro-batches and
    placement."""
    trained = TRAINED[algorithm]
    common = [
        f"model.path={case / 'policy'}",
        f"model.tokenizer={case / 'tokenizer'}",
        f"reference.model.path={case / 'reference'}",
        f"data.train={prompts(output, output / 'rollouts.jsonl')}",
        f"data.batch_size={NUM_PROMPTS}",
        f"algorithm.samples_per_prompt={SAMPLES_PER_PROMPT[algorithm]}",
        f"actor.generation.sampling.max_response_tokens={RESPONSE_TOKENS}",
        "actor.generation.engine=hf",
        "actor.generation.precision=fp32",
        "actor.consistency=error",
        f"actor.loss.clip_low={CLIP}",
        f"actor.loss.clip_high={CLIP}",
        f"actor.loss.entropy_coefficient={ENTROPY}",
        "reward.function=benchmarks.invariance.case:record",
        "loop.num_steps=1",
        f"output_dir={output}",
        "cluster.address=local",
        "cluster.worker_logs=false",
    ]
    common += [f"{role}.train.precision=fp32" for role in (*trained, "reference")]
    for role in trained:
        common += [
            f"{role}.num_epochs={NUM_EPOCHS}",
            f"{role}.train.optimizer.learning_rate={LEARNING_RATE}",
        ]
        common += [
            f"{role}.train.optimizer.epsilon={EPSILON}",
            f"{role}.train.optimizer.weight_decay={WEIGHT_DECAY}",
        ]
        common += [f"{role}.train.optimizer.clip_grad_norm={CLIP_GRAD_NORM}"]
    return common + _of_algorithm(algorithm, case)


def _of_algorithm(algorithm: str, case: Path) -> list[str]:
    if algorithm in ("grpo", "gspo"):
        loss = {"grpo": "ppo_clip", "gspo": "gspo"}[algorithm]
        return [
            f"actor.loss.name={loss}",
            "actor.loss.aggregation=seq_mean_token_mean",
            f"actor.loss.kl_coefficient={KL}",
        ]
    shared = [
        f"algorithm.gamma={GAMMA}",
        f"algorithm.lam={LAMBDA}",
        # Whitened advantages sum to 0, and so would the first step's loss: a relative error of 0
        # says nothing.
        "algorithm.whiten_advantages=false",
        f"algorithm.kl.coefficient={KL}",
    ]
    for role in TRAINED[algorithm][1:]:
        shared += [f"{role}.model.path={case / STARTS[role]}", f"{role}.loss.clip={VALUE_CLIP}"]
    if algorithm == "ppo":
        return shared
    return [
        *shared,
        "cost.function=benchmarks.invariance.case:cost",
        f"algorithm.lagrange.initial={MULTIPLIER}",
        f"algorithm.lagrange.learning_rate={MULTIPLIER_RATE}",
        f"algorithm.lagrange.threshold={COST_THRESHOLD}",
        f"data.pretraining={case / 'texts.jsonl'}",
        f"data.pretraining_batch_size={NUM_TEXTS}",
        f"actor.loss.pretraining_coefficient={PRETRAINING}",
    ]


def environment() -> dict[str, str]:
    """One thread a process, as the hosts have."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
