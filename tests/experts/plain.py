"""Tiny mixtures of experts, and what their routers do in plain transformers: one row at a time, by
loops over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.engines.threed_cases import TEMPERATURE, VOCABULARY, loss_fn
from workers.config import OptimizerConfig
from workers.engines.base import Outputs
from workers.sequences import Sequences

EXPERTS, CHOSEN = 8, 2
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": CHOSEN,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {"num_local_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
    },
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "head_dim": 16,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
"""Settings beyond the common ones; Qwen3-MoE has a dense layer in the middle, DeepSeek-V3 one at the
start, shared experts, groups and a bias of the choice; GPT-OSS has experts with biases, and attention
sinks."""
OTHER_ROUTERS: dict[str, dict[str, Any]] = {
    "granitemoe": {"num_local_experts": EXPERTS},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": CHOSEN, "head_dim": 8},
    "afmoe": {
        "num_experts": EXPERTS,
        "num_shared_experts": 1,
        "moe_intermediate_size": 32,
        "head_dim": 8,
        "sliding_window": 8,
    },
    "llama4_text": {
        "num_local_experts": EXPERTS,
        "intermediate_size_mlp": 32,
        "head_dim": 8,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 64,
    },
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": CHOSEN,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": 32,
        "head_dim": 8,
    },
    "minimax_m2": {"num_local_experts": EXPERTS, "head_dim": 8, "rotary_dim": 8},
    "lfm2_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 32,
        "layer_types": ["full_attention"] * 3,
    },
    "cohere2_moe": {"num_experts": EXPERTS, "head_dim": 8, "expert_selection_fn": "sigmoid"},
    "gemma4_text": {
        "num_experts": EXPERTS,
        "top_k_experts": CHOSEN,
        "moe_intermediate_size": 32,
        "enable_moe_block": True,
        "head_dim": 8,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
}
"""Families whose routers return something else, score otherwise, or keep their matrix in a module
within."""
ROUTERS = (".gate", ".router")
"""Ends of the names of routers."""
SIGMOIDS = ("deepseek_v3", "afmoe", "llama4_text", "minimax_m2", "lfm2_moe", "cohere2_moe")
"""Families whose routers score by a sigmoid."""
OPTIMIZER = OptimizerConfig(learning_rate=5e-3, clip_grad_norm=0.5, epsilon=1e-3)


def save_tiny_mixture(directory: Path, family: str, **settings: Any) -> Path:
    """A random model of `family` with routers that are far from even."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **{**COMMON, **(FAMILIES | OTHER_ROUTERS)[family], **settings}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" not in name:
                router = name.endswith(".weight") and any(f"{end}." in name for end in ROUTERS)
                size = 0.5 if router or "e_score" in name else 0.05
                tensor.add_(torch.randn_like(tensor), alpha=size)
    model.save_pretrained(directory)
    return directory


def load_mixture(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )


@contextmanager
def observed(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields (logits, experts) of every router that runs, in the order in which they do."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = []
    for name, module in model.named_modules():
        if name.endswith(ROUTERS) and type(module) is not nn.Linear:
            handles.append(
                module.register_forward_hook(lambda _, args, out: seen.append(choice_of(out)))
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def choice_of(outputs: Any) -> tuple[Tensor, Tensor]:
    """(logits, experts) of what a router returned."""
    if len(outputs) == 2:  # Llama 4: scores of all experts, logits
        return outputs[1], outputs[0].topk(CHOSEN).indices
    first, _, last = outputs
    return (first, last) if first.is_floating_point() else (last, first)


@dataclass(kw_only=True, slots=True)
class PlainStep:
    """One optimizer step in plain PyTorch."""

    loss: float
    aux_loss: float
    grad_norm: float
    chosen: list[list[int]]
    """By layer and expert: how many tokens chose it."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """After the step."""


def plain_step(model: PreTrainedModel, batch: Sequences, coefficient: float) -> PlainStep:
    """Loss and auxiliary loss of all rows in one graph; `model` is trained in place."""
    (step,) = plain_steps(model, [batch], coefficient)
    return step


def plain_steps(
    model: PreTrainedModel, batches: list[Sequences], coefficient: float
) -> list[PlainStep]:
    """One after the other with one optimizer."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.epsilon,
        weight_decay=0.0,
    )
    return [_step(model, batch, coefficient, optimizer) for batch in batches]


def _step(
    model: PreTrainedModel, batch: Sequences, coefficient: float, optimizer: torch.optim.AdamW
) -> PlainStep:
    tokens = batch.token_ids.split(batch.lengths.tolist())
    log_probs, entropies = [], []
    logits: list[list[Tensor]] = []
    chosen: list[list[int]] = []
    for ids, scored in zip(tokens, batch.scored_lengths.tolist(), strict=True):
        first = len(ids) - scored
        # The last token of a row predicts nothing, so that engines leave it out.
        read = ids[: max(len(ids) - 1, 1)]
        with observed(model) as routers:
            table = model(input_ids=read[None]).logits[0].float() / TEMPERATURE
        for layer, (scores, experts) in enumerate(routers):
            if len(logits) <= layer:
                logits.append([])
                chosen.append([0] * EXPERTS)
            logits[layer].append(scores)
            for expert in experts.flatten().tolist():
                chosen[layer][expert] += 1
        table = torch.log_softmax(table[first - 1 : first - 1 + scored], -1)
        log_probs.append(table.gather(-1, ids[first:, None]).squeeze(-1))
        entropies.append(-(table.exp() * table).sum(-1))
    outputs = Outputs(log_probs=torch.cat(log_probs), entropy=torch.cat(entropies))
    loss, _ = loss_fn(outputs, batch)
    aux_loss = torch.zeros(())
    for layer, parts in enumerate(logits):
        probability = probabilities(model, torch.cat(parts)).mean(0)
        total = sum(chosen[layer])
        for expert in range(EXPERTS):
            share = chosen[layer][expert] / total
            aux_loss = aux_loss + coefficient * EXPERTS * share * probability[expert]
    optimizer.zero_grad()
    (loss + aux_loss).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad_norm)
    optimizer.step()
    return PlainStep(
        loss=float(loss.detach()),
        aux_loss=float(aux_loss.detach()),
        grad_norm=float(norm),
        chosen=chosen,
        parameters={name: value.detach().clone() for name, value in model.named_parameters()},
    )


def probabilities(model: PreTrainedModel, logits: Tensor) -> Tensor:
    if model.config.model_type == "gemma4_text":
        return logits
    if model.config.model_type not in SIGMOIDS:
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True)
