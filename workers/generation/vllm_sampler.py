"""The sampler that the vLLM engine runs with: seeded draws and the log-prob of the sampled token, nothing else.

vLLM's own sampler returns either log-probs at temperature 1 or log-probs after top-p and top-k. A trainer computes neither: it
scores with the full softmax at the sampling temperature. It also ranks the sampled token in the vocabulary (a kernel that is
compiled at the first call, for seconds) and draws from the process' global random generator, which belongs to the trainer.
"""

from __future__ import annotations

import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler


class TrainerSampler(Sampler):
    """Put in the place of the model runner's sampler; logprobs_mode must be processed_logprobs."""

    def sample(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sampled ids [batch] and the scaled logits [batch, vocab] that they were drawn from before any filter."""
        if sampling_metadata.all_greedy:
            return self.greedy_sample(logits), logits
        assert sampling_metadata.temperature is not None
        scaled = self.apply_temperature(logits, sampling_metadata.temperature, sampling_metadata.all_random)
        filtered = scaled
        if sampling_metadata.top_k is not None or sampling_metadata.top_p is not None or sampling_metadata.logitsprocs.argmax_invariant:
            filtered = scaled.clone()  # the filters work in place
        for processor in sampling_metadata.logitsprocs.argmax_invariant:
            filtered = processor.apply(filtered)
        with torch.random.fork_rng(devices=[]):
            sampled, _ = self.topk_topp_sampler(filtered, sampling_metadata.generators, sampling_metadata.top_k, sampling_metadata.top_p)
        if not sampling_metadata.all_random:
            sampled = torch.where(sampling_metadata.temperature < 1e-5, self.greedy_sample(scaled), sampled)
        return sampled, scaled

    @staticmethod
    def gather_logprobs(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> LogprobsTensors:
        """Log-softmax at `token_ids` [tokens] of scores [tokens, vocab], logits or log-probs alike; no ranks, no runners-up."""
        assert num_logprobs == 0, "only the sampled token's log-prob is computed"
        ids = token_ids.unsqueeze(-1)
        chosen = logprobs.gather(-1, ids).float() - logprobs.float().logsumexp(dim=-1, keepdim=True)
        return LogprobsTensors(ids.to(torch.int32), chosen, torch.zeros_like(token_ids))
