"""PPO-ptx (Ouyang et al. 2022, eq. 2): adds text of the pretraining distribution to the responses
of an update.

A text is a row like any other, its first token the prompt and the rest the response, marked by the
column pretrain; the actor's loss is then cross-entropy on it (workers/losses/language.py). Leaves
out where texts come from: controllers/streams.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from controllers.streams import Stream
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.tracing import on_controller

ROW_COLUMNS = ("num_tokens", "mini_batch", "weight_version")
TOKEN_COLUMNS = ("advantages", "rollout_log_probs", "ref_log_probs")


@on_controller(
    reads=(
        "prompt_ids",
        "response_ids",
        "num_tokens",
        "advantages",
        "mini_batch",
        "weight_version",
    ),
    optional=("rollout_log_probs", "ref_log_probs", "loss_mask", "segment_lengths"),
    writes=("pretrain",),
    chooses_rows=True,
)
def with_pretraining(batch: Batch, stream: Stream) -> Batch:
    """The columns of the batch that an update reads, and the stream's next rows, spread evenly
    over the mini-batches; without rows in the batch there is nothing that they would accompany."""
    texts = stream.take()
    names = ["prompt_ids", "response_ids", "loss_mask", "segment_lengths"]
    names += [*ROW_COLUMNS, *TOKEN_COLUMNS]
    columns = [name for name in names if name in batch]
    rows = batch.select(*columns) | Batch.of(pretrain=torch.zeros(len(batch), dtype=torch.bool))
    if not texts or not batch:
        return rows
    lengths = texts.ragged("response_ids").lengths
    zeros = Ragged(torch.zeros(int(lengths.sum())), lengths)
    further: dict[str, Tensor | Ragged] = {name: zeros for name in TOKEN_COLUMNS if name in batch}
    if "loss_mask" in batch:
        further["loss_mask"] = Ragged(torch.ones(int(lengths.sum()), dtype=torch.bool), lengths)
    if "segment_lengths" in batch:
        further["segment_lengths"] = Ragged(lengths + 1, torch.ones_like(lengths))
    further["num_tokens"] = lengths + 1
    further["mini_batch"] = torch.arange(len(texts)) % (int(batch.tensor("mini_batch").max()) + 1)
    further["weight_version"] = torch.full((len(texts),), int(batch.tensor("weight_version").max()))
    further["pretrain"] = torch.ones(len(texts), dtype=torch.bool)
    return Batch.concat([rows, texts | Batch.of(**further)])
