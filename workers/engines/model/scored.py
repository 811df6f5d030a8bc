"""ScoredModel: a Hugging Face causal model whose forward pass returns numbers for the scored tokens
only.

Only the hidden states that are read reach the head, so a prompt's tokens cost no logits, and the
head answers with log-probabilities, so that logits never exist whole (log_probs.py). The model
family's own forward code runs unchanged. Loading is in loading.py; training engines shard and run
the module made here.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from workers.engines.base import Head
from workers.engines.model.log_probs import TokenScorer, head_log_probs, logits_tail
from workers.engines.model.packing import Packing
from workers.engines.model.rotary import follow_row_lengths
from workers.engines.model.router import find_routers
from workers.engines.model.routers import Routers
from workers.engines.model.routing import Routing
from workers.engines.model.split_plan import bounds
from workers.engines.model.tower import decoder_of
from workers.engines.model.vision import SeenImages, image_arguments, place_images

LOGGER = logging.getLogger(__name__)


class ScoredModel(nn.Module):
    """model(input_ids, read_positions, targets, packing=packing) -> {"log_probs": ..., "entropy":
    ...} | {"values": ...} | {"scores": ...}.

    Always in eval mode: dropout would make a loss depend on the layout.
    """

    def __init__(self, model: PreTrainedModel, head: Head) -> None:
        """`model` from AutoModelForCausalLM (Head.lm) or AutoModelForSequenceClassification
        with one label; may be on meta. Before tensor parallelism wraps its modules."""
        super().__init__()
        self.model = model
        self.head = head
        self._scorer: TokenScorer | None = None
        self._read_positions: Tensor | None = None
        model.eval()
        _freeze_empty(model)
        follow_row_lengths(model)
        place_images(model)
        routers = find_routers(model)
        self.routers = Routers(routers, decoder_layers(model) if routers else ())
        if head is Head.lm:
            self._prepare_head()

    def _prepare_head(self) -> None:
        try:
            tail = logits_tail(self.model)
        except ValueError as error:
            LOGGER.info("%s: the logits of a micro-batch are held whole", error)
            self.model.get_output_embeddings().register_forward_pre_hook(self._keep_read_positions)
        else:
            self._scorer = TokenScorer(self.model.get_output_embeddings(), tail)

    def split_vocabulary(self, group: ProcessGroup) -> None:
        """The output embedding was split over `group` (model/tensor_parallel.py)."""
        if self.head is not Head.lm or group.size() == 1:
            return
        if self._scorer is None:
            raise ValueError(
                f"tp={group.size()}: {self.model.config.model_type} has more than a linear layer "
                "between its decoder and its logits; use tp=1"
            )
        vocabulary = self._scorer.head.out_features
        self._scorer.group = group
        self._scorer.first_token, _ = bounds(vocabulary, group.rank(), group.size())

    def forward(
        self,
        input_ids: Tensor,
        read_positions: Tensor,
        targets: Tensor,
        *,
        packing: Packing | None = None,
        routing: Routing | None = None,
        images: SeenImages | None = None,
        entropy: bool = False,
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """input_ids int64 [rows, time], read_positions int64 [reads] into the flattened ids;
        float32 [reads] each."""
        where = layer_arguments(packing, routing)
        if images is not None:
            where |= image_arguments(images, packing)
        if self.head is Head.lm and self._scorer is None:
            self._read_positions = read_positions
            logits = self.model(input_ids=input_ids, use_cache=False, **where).logits
            numbers = head_log_probs(
                logits.flatten(0, 1), None, None, targets, temperature=temperature, entropy=entropy
            )
            return _named(*numbers)
        hidden = self.model.base_model(
            input_ids=input_ids, use_cache=False, **where
        ).last_hidden_state
        read = hidden.flatten(0, 1).index_select(0, read_positions)
        if self.head is Head.lm:
            output_embedding = self.model.get_output_embeddings()
            return _named(
                *output_embedding(read, targets, temperature=temperature, entropy=entropy)
            )
        return {"values" if self.head is Head.value else "scores": self.apply_score(read)}

    def apply_score(self, hidden: Tensor) -> Tensor:
        """The score head in float32, whatever the precision of the decoder: [reads, hidden] ->
        [reads]."""
        score = score_head(self.model)
        # Not a view: FSDP2 hangs its backward hook on what forward returns.
        numbers = torch.mv(hidden.float(), score.weight.float()[0])
        return numbers if score.bias is None else numbers + score.bias.float()

    def _keep_read_positions(self, _module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        """Before the output embedding: hidden states [rows, time, hidden] -> [1, reads, hidden]."""
        assert self._read_positions is not None, (
            "the language model was called past ScoredModel.forward"
        )
        read, self._read_positions = self._read_positions, None
        return (arguments[0].flatten(0, 1).index_select(0, read).unsqueeze(0),)


def layer_arguments(packing: Packing | None, routing: Routing | None) -> dict[str, Any]:
    """Keyword arguments of the model's forward that reach every layer."""
    arguments = packing.arguments if packing is not None else {}
    if routing is not None:
        arguments["routing"] = routing
    return arguments


def _named(log_probs: Tensor, entropies: Tensor | None) -> dict[str, Tensor]:
    return (
        {"log_probs": log_probs}
        if entropies is None
        else {"log_probs": log_probs, "entropy": entropies}
    )


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The linear head of a sequence-classification model."""
    head = model.get_submodule("score")
    assert isinstance(head, nn.Linear)
    return head


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in order: the entries of the longest ModuleList of the decoder."""
    decoder = decoder_of(model)
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"model.path: {type(model).__name__} has no list of decoder layers; use a decoder-only "
            "transformer"
        )
    longest = max(lists, key=len)
    return list(longest)


def parameter_bytes(model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of all parameters in `dtype`; works on meta."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _freeze_empty(model: PreTrainedModel) -> None:
    """Parameters without numbers (shared experts of which there are none) are not trained: collectives
    refuse empty gradients."""
    for parameter in model.parameters():
        if not parameter.numel():
            parameter.requires_grad_(False)
