"""Rows in flight on a vLLM engine, for the processes of cases.py; test_vllm.py judges the results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.generation import streams
from tests.generation.streams import PLAIN, all_rows
from workers.generation.base import GenerationEngine
from workers.generation.config import InFlight

COUNT = 18
"""Rows of an update: two more than may run."""


def measure(
    engine: GenerationEngine, hf: GenerationEngine, models: dict[str, Path]
) -> dict[str, Any]:
    """A replica of one process, and the reference engine."""
    from tests.generation.labelled import LabelledEngine

    assert isinstance(engine, LabelledEngine)
    both = [models["tied"], models["other_tied"]]
    results: dict[str, Any] = {}
    streams.update(engine, both[0], 1)
    hf.weight_version = 1
    for name, tested in (("stream", engine), ("hf stream", hf)):
        streams.submit_mixed(tested)
        results[name] = all_rows(tested)
    results["disturbed"] = streams.disturbed(engine)
    results["disturbed"]["slept"] = streams.slept(engine, both[0])
    for mode in (InFlight.recompute, InFlight.keep):
        keys, rows = streams.updated(engine, both, mode, COUNT)
        results[mode.value] = streams.gaps(both, [rows[key] for key in keys])
        results[f"{mode} versions"] = [rows[key].weight_versions.tolist() for key in keys]
        results[f"{mode} labels"] = [list(map(int, engine.labels[key])) for key in keys]
    results["without salt"] = without_salt(engine, both)
    results["slices"] = slices(engine, models)
    results["1000 rows"] = left_after_a_thousand(engine)
    return results


def without_salt(engine: Any, both: list[Path]) -> list[float]:
    """The gaps after an update with keep whose new rows look for prefixes as the old ones did."""
    prompts, seeds = streams.prompts_and_seeds(COUNT)
    streams.update(engine, both[0], 1)
    engine.submit(prompts, seeds, PLAIN)
    engine.run(5)
    streams.update(engine, both[1], 2, InFlight.keep)
    engine._salt -= 1
    keys = engine.submit(prompts, seeds, replace(PLAIN, max_response_tokens=3))
    rows = all_rows(engine)
    engine._salt += 1
    return streams.gaps(both, 2 * [rows[key] for key in keys])[:COUNT]


def left_after_a_thousand(engine: Any) -> dict[str, int]:
    """The sizes of everything that has an entry for a row, when a thousand more have finished."""
    prompt = np.array([5, 6, 7])
    lengths = 1 + np.arange(1000) % 3
    engine.generate([prompt] * 1000, np.arange(1000), replace(PLAIN, stop_token_ids=[9]), lengths)
    core = engine.llm.llm_engine.engine_core.engine_core
    return {
        "requests": len(engine._requests) + engine.num_unfinished + len(engine._finished),
        "sampler": len(engine._sampler._draws) + len(engine._sampler._slots),
        "slots": len(engine._sampler._log_probs),
        "vllm": len(engine.llm.llm_engine.output_processor.request_states),
        "scheduler": len(core.scheduler.requests),
    }


def slices(engine: GenerationEngine, models: dict[str, Path]) -> dict[str, Any]:
    """On a replica of two ranks: the rows that every slice of two steps finished, with an update in
    the fourth, and the gaps of all."""
    both = [models["tied"], models["other_tied"]]
    streams.update(engine, both[0], 1)
    prompts, seeds = streams.prompts_and_seeds()
    keys = engine.submit(prompts, seeds, PLAIN, streams.limits())
    finished, rows = [], {}
    for steps in streams.sliced(engine, 2):
        if steps == 8:
            engine.cancel(keys[3:4])
            streams.update(engine, both[1], 2)
            keys += engine.submit(prompts, seeds, PLAIN, streams.limits())
        ended = engine.finished()
        finished.append(sorted(ended))
        rows |= ended
    cancelled = keys[3]
    judged = [rows[key] for key in keys if key not in (cancelled, keys[13])]
    return {
        "finished": finished,
        "cancelled": cancelled in rows,
        "ids": [row.token_ids.tolist() for row in judged],
        "log_probs": [row.log_probs for row in judged],
        "versions": [row.weight_versions.tolist() for row in judged],
    }
