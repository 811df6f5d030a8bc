"""A limit of its own for every row: the same tokens as without, cut there."""

from pathlib import Path

import numpy as np
import pytest

from tests.generation.cases import context, make_model, rows
from workers.config import ModelConfig, Precision
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.generation.hf import HfEngine
from workers.generation.sampling import most_tokens


def test_rows_end_at_their_limits(tmp_path: Path) -> None:
    make_model(tmp_path, tied=False)
    engine = HfEngine(
        model=ModelConfig(path=str(tmp_path)),
        config=GenerationConfig(precision=Precision.fp32),
        context=context(0),
    )
    prompts, seeds = rows()
    sampling = SamplingConfig(max_response_tokens=6, ignore_eos=True)
    limits = np.arange(len(prompts)) % 8 + 1
    whole = engine.generate(prompts, seeds, sampling).response_ids.reshape(len(prompts), 6)
    made = engine.generate(prompts, seeds, sampling, limits)
    assert made.lengths.tolist() == np.minimum(limits, 6).tolist()
    expected = np.concatenate(
        [row[:length] for row, length in zip(whole, made.lengths, strict=True)]
    )
    assert made.response_ids.tolist() == expected.tolist()
    assert set(made.finish_reasons) == {"length"}


def test_wrong_limits_are_named() -> None:
    with pytest.raises(ValueError, match="row 1 is 0"):
        most_tokens(2, SamplingConfig(), np.array([4, 0]))
    with pytest.raises(ValueError, match="1 for 2 prompts"):
        most_tokens(2, SamplingConfig(), np.array([4]))
