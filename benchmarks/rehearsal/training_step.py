"""A training step of a model of full width, and its bytes by the mapper."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from benchmarks.rehearsal.memory_cases import Case
from hybridflow.mapping.question.layouts import ModelLayout
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.workload import Lengths, Workload
from hybridflow.mapping.simulate.footprint import Footprint, resident_footprint
from hybridflow.mapping.simulate.moments import pass_footprint
from recipes.mapping_question import precision_space
from workers.config import TrainConfig
from workers.engines import engine_class
from workers.losses.aggregation import Aggregation, Counts, weight_columns
from workers.sequences import Sequences


def hf_config(family: type[PretrainedConfig], spec: ModelSpec) -> PretrainedConfig:
    """The model that the specification describes."""
    sizes: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": spec.tied_embeddings,
    }
    if spec.num_experts:
        sizes |= {
            "head_dim": spec.head_dim,
            "num_experts": spec.num_experts,
            "num_experts_per_tok": spec.experts_per_token,
            "moe_intermediate_size": spec.expert_intermediate_size,
        }
    return family(**sizes)


def batch_of(case: Case, vocabulary: int) -> Sequences:
    lengths = torch.full((case.rows,), case.prompt + case.response)
    scored = torch.full((case.rows,), case.response)
    tokens = int(scored.sum())
    columns = weight_columns(
        scored, Counts(num_tokens=tokens, num_rows=case.rows), Aggregation.token_mean
    )
    columns |= {"advantages": torch.randn(tokens), "rollout_log_probs": -torch.rand(tokens)}
    ids = torch.randint(2, vocabulary, (int(lengths.sum()),))
    return Sequences(token_ids=ids, lengths=lengths, scored_lengths=scored, per_token=columns)


def predicted(case: Case, spec: ModelSpec, config: TrainConfig) -> tuple[Footprint, Footprint]:
    """Between the steps, and what a step adds."""
    engine = engine_class(case.engine)
    space = engine.limit(precision_space(config.precision))
    data = case.devices // (config.tp * config.pp)
    layout = ModelLayout(
        p=config.pp,
        t=config.tp,
        d=data,
        zero=engine.zero_stage(config),
        recompute=config.activation_checkpointing,
        selective=config.selective_checkpointing,
        offload_activations=config.offload_activations,
        micro_batch_tokens=config.micro_batch_tokens,
    )
    workload = Workload(
        batch_size=case.rows * data,
        prompt=Lengths.fixed(case.prompt),
        response=Lengths.fixed(case.response),
    )
    resident = resident_footprint(spec, layout, space, trained=True)
    step = pass_footprint(
        spec,
        layout,
        space,
        workload,
        case.rows // case.rows_at_once,
        trained=True,
        backward=True,
    )
    return resident, step
