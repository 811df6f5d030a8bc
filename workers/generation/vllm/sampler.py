"""The sampler that the vLLM engine runs with: the project's draws, and the log-prob of the sampled
token, nothing else.

vLLM's own sampler returns log-probs at temperature 1 or after top-p and top-k, where a trainer
scores with the full softmax at the sampling temperature; it ranks every sampled token in the
vocabulary (by a kernel compiled at the first call, for seconds); it draws from the process' global
generator, which is the trainer's; and on CPU its noise takes a third of the time of a small model.
Log-probs are recorded here by row and position, because passing them through vLLM's output costs
Python per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from workers.generation.config import SamplingConfig
from workers.generation.draws import sample_tokens

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

ROW = "row"
"""Key of a request's extra_args: the row of the call that it generates."""


class TrainerSampler(Sampler):
    """Put in the place of the model runner's sampler.

    sampler.start(seeds, sampling); ...run requests whose extra_args are {ROW: row}...; log_probs =
    sampler.finish()
    """

    def __init__(self, runner: GPUModelRunner) -> None:
        super().__init__()
        self._runner = runner
        self._sampling: SamplingConfig | None = None

    def start(
        self,
        seeds: NDArray[np.int64],
        sampling: SamplingConfig,
        forced: NDArray[np.int64] | None = None,
    ) -> None:
        """Draw rows by `seeds` until finish; with `forced` [rows, max_response_tokens], take those
        tokens in place of draws."""
        self._sampling = sampling
        self._forced = None if forced is None else torch.from_numpy(forced).to(self._runner.device)
        device = self._runner.device
        self._seeds = torch.from_numpy(np.ascontiguousarray(seeds, dtype=np.int64)).to(device)
        self._log_probs = torch.zeros(len(seeds), sampling.max_response_tokens, device=device)

    def finish(self) -> NDArray[np.float32]:
        """Log-probs [rows, max_response_tokens]; those after a row's end have no meaning."""
        self._sampling = None
        return self._log_probs.cpu().numpy()

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: str | None = None,
    ) -> SamplerOutput:
        """One token for every row of logits [batch, vocab]; vLLM's own way outside start and
        finish (its warm-up, scoring)."""
        if self._sampling is None:
            return super().forward(
                logits, sampling_metadata, predict_bonus_token, logprobs_mode_override
            )
        batch, requests = self._runner.input_batch, self._runner.requests
        count = logits.shape[0]
        table = np.empty((2, count), dtype=np.int64)
        table[0] = [requests[name].sampling_params.extra_args[ROW] for name in batch.req_ids]
        # A row that is still within its prompt draws too; vLLM discards that token, and the draw at
        # position 0 is repeated.
        table[1] = batch.num_tokens_no_spec[:count] - batch.num_prompt_tokens[:count]
        rows, positions = torch.from_numpy(table).to(logits.device)
        if self._forced is None:
            ids, log_probs = sample_tokens(logits, self._seeds[rows], positions, self._sampling)
        else:
            ids = self._forced[rows, positions]
            log_probs = logits.float().log_softmax(dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        self._log_probs[rows, positions] = log_probs
        return SamplerOutput(
            sampled_token_ids=ids.to(torch.int32).unsqueeze(-1), logprobs_tensors=None
        )

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
