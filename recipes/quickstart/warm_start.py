"""Supervised warm start: the tiny model imitates the demonstrations for a few seconds.

Plain PyTorch on one thread, because nothing here is about scale; `python -m recipes.sft` is the
distributed way. The result depends on the seed only, on one kind of machine (one thread, so that
sums are added in one order).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, Qwen2ForCausalLM, Qwen2Tokenizer

from recipes.quickstart.task import MAX_RESPONSE_TOKENS, Example

IGNORED = -100
"""cross_entropy's label for what is not learned."""
Row = tuple[list[int], list[bool]]
"""The tokens of a demonstration, and which of them are learned."""


@dataclass(kw_only=True)
class WarmStartConfig:
    num_steps: int = 200
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    decay_fraction: float = 0.4
    """The learning rate falls linearly to zero over this last part of the steps."""
    clip_grad_norm: float = 1.0

    def learning_rate_at(self, step: int) -> float:
        """Trapezoid: up, level, down. Steps count from 0."""
        up = (step + 1) / self.warmup_steps
        down = (self.num_steps - step) / (self.decay_fraction * self.num_steps)
        return self.learning_rate * min(1.0, up, down)


def warm_start(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    examples: Sequence[Example],
    config: WarmStartConfig,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Trains `model` in place; on_step(steps done, loss) is called after every step."""
    rows = [learned(*tokenize(tokenizer, example)) for example in examples]
    imitate(model, rows, config, seed, on_step)


def imitate(
    model: Qwen2ForCausalLM,
    rows: Sequence[Row],
    config: WarmStartConfig,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Trains `model` in place on the learned tokens of the rows."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    random_ = random.Random(seed)
    model.train()
    with one_thread():
        for step in range(config.num_steps):
            inputs, labels = padded(random_.choices(rows, k=config.batch_size))
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            optimizer.step()
            on_step(step + 1, loss.item())
    model.eval()


def tokenize(tokenizer: Qwen2Tokenizer, example: Example) -> tuple[list[int], list[int]]:
    """(prompt, response): the prompt as the data pipeline will make it, the demonstration with
    the end token."""
    return prompt_ids(tokenizer, example.question), [
        *tokenizer.encode(example.demonstration),
        tokenizer.eos_token_id,
    ]


def learned(prompt: list[int], response: list[int]) -> Row:
    """Both as one row, of which the response is learned."""
    return prompt + response, [False] * len(prompt) + [True] * len(response)


def prompt_ids(tokenizer: Qwen2Tokenizer, question: str) -> list[int]:
    message = {"role": "user", "content": question}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """(inputs, labels), int64 [rows, time - 1]: labels are the next tokens, of learned ones only.
    Right padding needs no mask."""
    width = max(len(ids) for ids, _ in rows)
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED)
    for number, (ids, is_learned) in enumerate(rows):
        tokens, mask = torch.tensor(ids), torch.tensor(is_learned)
        inputs[number, : len(tokens)] = tokens
        labels[number, : len(tokens)] = tokens.masked_fill(~mask, IGNORED)
    return inputs[:, :-1], labels[:, 1:]


@torch.no_grad()
def greedy_accuracy(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, examples: Sequence[Example]
) -> float:
    """Fraction of examples whose most likely response is the answer, by plain transformers."""
    model.eval()
    correct = 0
    by_length: dict[int, list[Example]] = {}
    for example in examples:
        by_length.setdefault(len(example.question), []).append(example)
    with one_thread():
        for group in by_length.values():
            prompts = torch.tensor([prompt_ids(tokenizer, example.question) for example in group])
            responses = decode_greedily(model, prompts)
            texts = tokenizer.batch_decode(responses.tolist(), skip_special_tokens=True)
            for text, example in zip(texts, group, strict=True):
                correct += text == example.answer
    return correct / len(examples)


def decode_greedily(model: Qwen2ForCausalLM, prompts: Tensor) -> Tensor:
    """int64 [rows, MAX_RESPONSE_TOKENS] from prompts of one length; after the end token, only
    end tokens."""
    end = model.config.eos_token_id
    cache, tokens, responses = DynamicCache(config=model.config), prompts, []
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(MAX_RESPONSE_TOKENS):
        logits = model(
            input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        tokens = logits.argmax(-1).masked_fill(done, end)[:, None]
        done |= tokens[:, 0] == end
        responses.append(tokens)
    return torch.cat(responses, dim=1)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
