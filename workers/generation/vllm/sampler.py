"""The sampler that the vLLM engine runs with: the project's draws, and the log-prob of the sampled
token, nothing else.

vLLM's own sampler returns log-probs at temperature 1 or after top-p and top-k, where a trainer
scores with the full softmax at the sampling temperature; it ranks every sampled token in the
vocabulary (by a kernel compiled at the first call, for seconds); it draws from the process' global
generator, which is the trainer's; and on CPU its noise takes a third of the time of a small model.
Log-probs and the weights' versions are recorded here by row and position, because passing them
through vLLM's output costs Python per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from workers.engines.shared.together import sent
from workers.generation.config import SamplingConfig
from workers.generation.draws import Draws, draw_groups, sample_grouped

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class TrainerSampler(Sampler):
    """Put in the place of the model runner's sampler.

    sampler.add(request, Draws(seed)); ...vLLM's steps...; sampler.take(request, num_tokens)

    A request has a slot of the tables from its first step on, until take or drop; the tables grow
    with the slots in use and the longest response.
    """

    weight_version: int = -1
    """Recorded with every token."""

    def __init__(self, runner: GPUModelRunner) -> None:
        super().__init__()
        self._runner = runner
        self._draws: dict[str, Draws] = {}
        self._slots: dict[str, int] = {}
        self._free_slots: list[int] = []
        self._log_probs = torch.zeros(0, 0, device=runner.device)
        self._versions = torch.zeros(0, 0, dtype=torch.int32, device=runner.device)
        self._batch = DrawnBatch([], [], [], runner.device)

    def add(self, request: str, draws: Draws) -> None:
        """Draw the tokens of a request of vLLM's (its internal id) from now on."""
        self._draws[request] = draws

    def take(self, request: str, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Log-probs and weight versions of the `count` tokens of a request, which is forgotten."""
        slot = self._slots[request]
        log_probs = self._log_probs[slot, :count].cpu().numpy().copy()
        versions = self._versions[slot, :count].cpu().numpy().astype(np.int64)
        self.drop(request)
        return log_probs, versions

    def drop(self, request: str) -> None:
        """Forget a request."""
        del self._draws[request]
        if request in self._slots:
            self._free_slots.append(self._slots.pop(request))

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: str | None = None,
    ) -> SamplerOutput:
        """One token for every row of logits [batch, vocab]; vLLM's own way where there are no
        requests (its warm-up)."""
        if not self._draws:
            return super().forward(
                logits, sampling_metadata, predict_bonus_token, logprobs_mode_override
            )
        batch, count = self._runner.input_batch, logits.shape[0]
        if batch.req_ids != self._batch.requests:
            self._batch = self._compose(list(batch.req_ids))
        # A row that is still within its prompt draws too; vLLM discards that token, and the draw at
        # its position is repeated.
        counts = batch.num_tokens_no_spec[:count] - batch.num_prompt_tokens[:count]
        self._grow(len(self._log_probs), int(counts.max()) + 1)
        counts = counts.astype(np.int64)
        (places,) = sent([torch.from_numpy(counts)], logits.device)
        ids, log_probs = self._batch.draw(logits, places, counts)
        self._log_probs[self._batch.slots, places] = log_probs
        self._versions[self._batch.slots, places] = self.weight_version
        return SamplerOutput(
            sampled_token_ids=ids.to(torch.int32).unsqueeze(-1), logprobs_tensors=None
        )

    def _compose(self, requests: list[str]) -> DrawnBatch:
        """The batch of `requests`; those that are new get a slot."""
        slots = []
        for request in requests:
            if request not in self._slots:
                if not self._free_slots:
                    self._grow(len(self._log_probs) + 1, self._log_probs.shape[1])
                self._slots[request] = self._free_slots.pop()
            slots.append(self._slots[request])
        draws = [self._draws[request] for request in requests]
        return DrawnBatch(requests, slots, draws, self._runner.device)

    def _grow(self, slots: int, tokens: int) -> None:
        """Make the tables at least this large: twice as large as they were, so that it is rare."""
        old_slots, old_tokens = self._log_probs.shape
        if slots <= old_slots and tokens <= old_tokens:
            return
        if slots > old_slots:
            slots = max(slots, 2 * old_slots, 16)
        if tokens > old_tokens:
            tokens = max(tokens, 2 * old_tokens, 64)
        more = (0, tokens - old_tokens, 0, slots - old_slots)
        self._log_probs, self._versions = pad(self._log_probs, more), pad(self._versions, more)
        self._free_slots += reversed(range(old_slots, slots))

    @staticmethod
    def gather_logprobs(
        logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor
    ) -> LogprobsTensors:
        """Log-probs of prompt tokens `token_ids` [tokens] from [tokens, vocab]; no ranks, no
        runners-up."""
        assert num_logprobs == 0, "only the given tokens' log-probs are computed"
        ids = token_ids.unsqueeze(-1)
        return LogprobsTensors(
            ids.to(torch.int32), logprobs.gather(-1, ids), torch.zeros_like(token_ids)
        )


class DrawnBatch:
    """The requests of a step and how their tokens are drawn; the same in the next step as long as
    no request comes or goes."""

    def __init__(
        self,
        requests: list[str],
        slots: Sequence[int],
        draws: Sequence[Draws],
        device: torch.device,
    ) -> None:
        self.requests = requests
        self._forced: dict[int, Sequence[int]] = {}
        samplings: dict[int, SamplingConfig] = {}
        for place, row in enumerate(draws):
            if row.forced:
                self._forced[place] = row.forced
            else:
                samplings[place] = row.sampling
        groups = draw_groups(samplings, "cpu")
        numbers = [list(slots), [row.seed for row in draws], [row.position for row in draws]]
        tensors = [torch.tensor(column, dtype=torch.int64) for column in numbers]
        tensors += [rows for _, rows in groups]
        self.slots, self._seeds, self._first, *places = sent(tensors, device)
        settings = [sampling for sampling, _ in groups]
        self._groups = list(zip(settings, places, strict=True))

    def draw(
        self, logits: torch.Tensor, places: torch.Tensor, counts: NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [batch] and log-probs [batch]; `places` and `counts` [batch]: tokens that each row
        has, on the device and on the host."""
        ids, log_probs = sample_grouped(logits, self._seeds, self._first + places, self._groups)
        for row, forced in self._forced.items():
            token = forced[counts[row]]
            ids[row].fill_(token)  # assigning a number would copy it from the host
            log_probs[row] = logits[row].float().log_softmax(dim=-1)[token]
        return ids, log_probs
