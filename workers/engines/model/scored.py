"""ScoredModel: a Hugging Face causal model whose forward pass returns numbers for the scored tokens only.

Only the hidden states that are read reach the head, so a prompt's tokens cost no logits. The model family's
own forward code runs unchanged (logit scaling, soft-capping). Loading is in loading.py; training engines
shard and run the module made here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from workers.engines.base import Head
from workers.engines.model.log_probs import LogProbFn, token_log_probs
from workers.engines.model.packing import Packing


class ScoredModel(nn.Module):
    """model(input_ids, read_positions, targets, packing=packing) -> {"log_probs": ..., "entropy": ...} |
    {"values": ...} | {"scores": ...}.

    Always in eval mode: dropout would make a loss depend on the layout.
    """

    def __init__(self, model: PreTrainedModel, head: Head, log_prob_fn: LogProbFn = token_log_probs) -> None:
        """`model` from AutoModelForCausalLM (Head.lm) or AutoModelForSequenceClassification with one label;
        may be on meta."""
        super().__init__()
        self.model = model
        self.head = head
        self.log_prob_fn = log_prob_fn
        """Replaced where the logits are sharded over the vocabulary."""
        self._read_positions: Tensor | None = None
        model.eval()
        if head is Head.lm:
            model.get_output_embeddings().register_forward_pre_hook(self._keep_read_positions)

    def forward(
        self,
        input_ids: Tensor,
        read_positions: Tensor,
        targets: Tensor,
        *,
        packing: Packing | None = None,
        entropy: bool = False,
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """input_ids int64 [rows, time], read_positions int64 [reads] into the flattened ids; float32 [reads]
        each."""
        where = packing.arguments if packing is not None else {}
        if self.head is Head.lm:
            self._read_positions = read_positions
            logits = self.model(input_ids=input_ids, use_cache=False, **where).logits
            log_probs, entropies = self.log_prob_fn(logits.flatten(0, 1), targets, temperature, entropy)
            return (
                {"log_probs": log_probs}
                if entropies is None
                else {"log_probs": log_probs, "entropy": entropies}
            )
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False, **where).last_hidden_state
        numbers = self.apply_score(hidden.flatten(0, 1).index_select(0, read_positions))
        return {"values" if self.head is Head.value else "scores": numbers}

    def apply_score(self, hidden: Tensor) -> Tensor:
        """The score head in float32, whatever the precision of the decoder: [reads, hidden] -> [reads]."""
        score = score_head(self.model)
        # Not a view: FSDP2 hangs its backward hook on what forward returns.
        numbers = torch.mv(hidden.float(), score.weight.float()[0])
        return numbers if score.bias is None else numbers + score.bias.float()

    def _keep_read_positions(self, _module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        """Before the output embedding: hidden states [rows, time, hidden] -> [1, reads, hidden]."""
        assert self._read_positions is not None, "the language model was called past ScoredModel.forward"
        read, self._read_positions = self._read_positions, None
        return (arguments[0].flatten(0, 1).index_select(0, read).unsqueeze(0),)


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The linear head of a sequence-classification model."""
    head = model.get_submodule("score")
    assert isinstance(head, nn.Linear)
    return head


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in order: the entries of the longest ModuleList of the base model."""
    lists: list[nn.ModuleList] = [
        module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)
    ]
    if not lists:
        raise ValueError(
            f"model.path: {type(model).__name__} has no list of decoder layers; use a decoder-only "
            "transformer"
        )
    longest = max(lists, key=len)
    return list(longest)


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in the backward pass; the layers' contents stay in eval mode."""
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"activation_checkpointing is true, but {type(model).__name__} does not support it; set it to "
            "false"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def parameter_bytes(model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of all parameters in `dtype`; works on meta."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
