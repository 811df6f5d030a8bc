"""Stage A: a decode step of the sampler that vLLM runs with, on a hollow GPU.

    python -m benchmarks.rehearsal.decoding

Prints a JSON list of rows as case.py does: a step with the requests of the step before, one that
requests have joined, and one of a probe's forced tokens. The model's own launches are left out.
"""

from __future__ import annotations

# isort: off
from benchmarks.rehearsal.hollow import Hollow, become_gpu
# isort: on

import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.rehearsal.case import Counter, Row

REQUESTS, VOCABULARY = 64, 1024


def main() -> None:
    become_gpu()
    from workers.generation.draws import Draws
    from workers.generation.vllm.sampler import TrainerSampler

    rows: list[Row] = []
    device = torch.device("cuda:0")
    with Hollow() as hollow, torch.no_grad():
        batch = SimpleNamespace(req_ids=[], num_tokens_no_spec=None, num_prompt_tokens=None)
        runner: Any = SimpleNamespace(device=device, input_batch=batch)
        sampler = TrainerSampler(runner)
        metadata: Any = None

        def step(first: int, count: int, tokens: int) -> None:
            batch.req_ids = [str(number) for number in range(first, first + count)]
            batch.num_prompt_tokens = np.zeros(count, dtype=np.int32)
            batch.num_tokens_no_spec = np.full(count, tokens, dtype=np.int32)
            logits = torch.zeros(count, VOCABULARY, dtype=torch.bfloat16, device=device)
            sampler.forward(logits, metadata)

        for number in range(REQUESTS):
            sampler.add(str(number), Draws(seed=number))
        step(0, REQUESTS // 2, 0)
        with Counter(rows, hollow, "decoding: the same requests"):
            step(0, REQUESTS // 2, 1)
        with Counter(rows, hollow, "decoding: others join"):
            step(0, REQUESTS, 2)
        sampler.add(str(REQUESTS), Draws(forced=[5, 6, 7, 8]))
        step(REQUESTS, 1, 0)
        with Counter(rows, hollow, "decoding: forced"):
            step(REQUESTS, 1, 1)
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
