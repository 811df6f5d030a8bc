"""What the tests and the benchmark of engine `threed` share: tiny models of every family, a batch,
and the plain single-process run.

The plain run is transformers and torch.optim only: one row at a time, no padding, no micro-batches,
logits in full.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from workers.config import OptimizerConfig
from workers.engines.base import Head, LossFn, Outputs
from workers.sequences import Sequences

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text")
NUM_STEPS = 3
TEMPERATURE = 0.8
VOCABULARY = 96


def save_tiny_model(
    directory: Path,
    family: str,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 4,
    tied: bool = False,
) -> Path:
    """A random model of `family` as a Hugging Face directory; sliding windows shorter than the
    rows where the family has them."""
    options: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": tied,
    }
    if family == "qwen3" or family.startswith("gemma"):
        options["head_dim"] = 16
    if family == "gpt_oss":
        options |= {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    if family in ("mistral", "gemma2", "gemma3_text", "gpt_oss"):
        options["sliding_window"] = 5
    if family == "gemma2":
        options["attn_logit_softcapping"] = 1.0  # low enough to be felt by tiny weights
    if family in ("gemma2", "gemma3_text", "gpt_oss"):
        options["layer_types"] = [
            "sliding_attention" if index % 2 == 0 else "full_attention" for index in range(layers)
        ]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **options), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(directory)
    return directory


def make_sequences(num_rows: int = 10, seed: int = 0) -> Sequences:
    """Ragged rows of 4 to 17 tokens, of many one with 2 tokens and one with 1; one of them
    without scored tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 18, (num_rows,), generator=generator)
    if num_rows >= 8:
        lengths[-2:] = torch.tensor([2, 1])
    scored = torch.minimum(torch.randint(1, 12, (num_rows,), generator=generator), lengths - 1)
    scored[num_rows // 2] = 0
    num_scored = int(scored.sum())
    return Sequences(
        token_ids=torch.randint(3, VOCABULARY, (int(lengths.sum()),), generator=generator),
        lengths=lengths,
        scored_lengths=scored,
        per_token={"weights": torch.randn(num_scored, generator=generator) / num_scored},
        per_row={"targets": torch.randn(num_rows, generator=generator)},
    )


def loss_fn(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, dict[str, Tensor]]:
    """Something that depends on every output that the head has, with weights that hold the global
    normalisation."""
    weights, targets = sequences.per_token["weights"], sequences.per_row["targets"]
    if outputs.log_probs is not None:
        assert outputs.entropy is not None
        loss = -(weights * outputs.log_probs).sum() - 0.01 * (weights.abs() * outputs.entropy).sum()
        return loss, {"tokens": torch.tensor(float(len(weights)))}
    if outputs.values is not None:
        return (weights.abs() * (outputs.values - weights.sign()).square()).sum(), {
            "values": outputs.values.detach().sum()
        }
    assert outputs.scores is not None
    return (outputs.scores - targets).square().sum() / 10, {
        "rows": torch.tensor(float(len(targets)))
    }


@dataclass(kw_only=True, slots=True)
class PlainRun:
    """What the single process computed."""

    outputs: Outputs
    """Before the first step."""
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """After the last step."""


def plain_run(
    model: PreTrainedModel,
    head: Head,
    batches: list[Sequences],
    config: OptimizerConfig,
    loss_fn: LossFn = loss_fn,
) -> PlainRun:
    """One optimizer step per batch with plain PyTorch; `model` is trained in place."""
    decays = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decays, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )
    with torch.no_grad():
        run = PlainRun(outputs=plain_outputs(model, head, batches[0]))
    for batch in batches:
        optimizer.zero_grad()
        loss, _ = loss_fn(plain_outputs(model, head, batch), batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        run.losses.append(loss.item())
        run.grad_norms.append(norm.item())
    run.parameters = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters()
    }
    return run


def plain_outputs(model: PreTrainedModel, head: Head, batch: Sequences) -> Outputs:
    """Row by row, with full logits."""
    log_probs, entropies, values, scores = [], [], [], []
    for tokens, scored in zip(
        batch.token_ids.split(batch.lengths.tolist()), batch.scored_lengths.tolist(), strict=True
    ):
        first = len(tokens) - scored
        if head is Head.lm:
            logits = model(input_ids=tokens[None]).logits[0, first - 1 : -1].float() / TEMPERATURE
            table = torch.log_softmax(logits, -1)
            log_probs.append(table.gather(-1, tokens[first:, None]).squeeze(-1))
            entropies.append(-(table.exp() * table).sum(-1))
        else:
            hidden = model.base_model(input_ids=tokens[None]).last_hidden_state[0]
            numbers = model.get_submodule("score")(hidden).squeeze(-1)
            values.append(numbers[first - 1 : -1])
            scores.append(numbers[-1])
    if head is Head.lm:
        return Outputs(log_probs=torch.cat(log_probs), entropy=torch.cat(entropies))
    return (
        Outputs(values=torch.cat(values))
        if head is Head.value
        else Outputs(scores=torch.stack(scores))
    )


def load_plain(directory: Path, head: Head) -> PreTrainedModel:
    """With transformers alone and its plainest attention, the only one with soft-capping; a new
    value head is zero (set it from the engine's)."""
    if head is Head.lm:
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
    return AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=1, dtype=torch.float32, attn_implementation="eager"
    )
