"""Layouts of engine `threed`: those that do not fit are refused with those that do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, PretrainedConfig

from workers.config import TrainConfig
from workers.engines.threed.engine import ThreeDEngine
from workers.engines.threed.layout import check_layout, fitting_layouts, stage_layers


def model(**changes: int) -> PretrainedConfig:
    options = {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 96,
        "hidden_size": 32,
    }
    return AutoConfig.for_model("llama", **{**options, **changes})


def test_layout_follows_the_rank_order() -> None:
    train = TrainConfig(pp=2, tp=2, rank_order=["pp", "dp", "cp", "tp"])
    check_layout(model(), train, 8)
    layout = ThreeDEngine.make_layout(train, 8)
    assert layout.coordinates(5) == {"pp": 1, "dp": 0, "cp": 0, "tp": 1}
    assert layout.groups("pp")[0] == (0, 4)


@pytest.mark.parametrize(
    ("train", "changes", "message"),
    [
        (
            TrainConfig(tp=8),
            {},
            (
                r"tp=8 does not fit llama: .*num_attention_heads 4; sizes that fit: 1, 2, 4; on 8 "
                r"devices fit: pp=1 tp=1 \(dp=8\)"
            ),
        ),
        (
            TrainConfig(tp=2),
            {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24},
            (
                r"tp=2 does not fit.*num_attention_heads 3.*sizes that fit: 1, 3; on 8 devices fit: "
                r"pp=1 tp=1 \(dp=8\), pp=2"
            ),
        ),
        (
            TrainConfig(pp=8),
            {},
            (
                r"pp=8 .*8 pipeline stages, but the model has 4 layers; on 8 devices fit: .*pp=4 "
                r"tp=2 \(dp=1\)"
            ),
        ),
        (TrainConfig(pp=3), {}, r"pp=3 x tp=1 does not divide the 8 devices"),
        (
            TrainConfig(pp=4, pipeline_schedule="interleaved_1f1b", virtual_stages=2),
            {},
            r"virtual_stages=2 makes 8 pipeline stages",
        ),
        (
            TrainConfig(pp=2, pipeline_schedule="interleaved_1f1b"),
            {},
            r"interleaved_1f1b with pp=2 and virtual_stages=1; both must be at least 2",
        ),
        (
            TrainConfig(pp=2, virtual_stages=2),
            {},
            r"virtual_stages is 2 with pipeline_schedule 1f1b",
        ),
        (
            TrainConfig(pipeline_schedule="gpipe"),
            {},
            r"pipeline_schedule is 'gpipe'; known: 1f1b, interleaved_1f1b",
        ),
        (TrainConfig(rank_order=["dp", "tp"]), {}, r"rank_order is .*each of dp, pp, cp, tp once"),
    ],
)
def test_what_does_not_fit_is_refused(
    train: TrainConfig, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(model(**changes), train, 8)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 3))
def test_listed_layouts_are_accepted_and_no_others(world_size: int, virtual: int) -> None:
    listed = fitting_layouts(model(), world_size, virtual)
    for pipeline in range(1, world_size + 1):
        for tensor in range(1, world_size + 1):
            interleaved = virtual > 1
            if interleaved and pipeline == 1:
                continue
            schedule = "interleaved_1f1b" if interleaved else "1f1b"
            train = TrainConfig(
                pp=pipeline, tp=tensor, pipeline_schedule=schedule, virtual_stages=virtual
            )
            try:
                check_layout(model(), train, world_size)
            except ValueError:
                assert all((pipeline, tensor) != (p, t) for p, t, _ in listed)
            else:
                data = ThreeDEngine.make_layout(train, world_size).axis_size("dp")
                assert (pipeline, tensor, data) in listed


@settings(deadline=None)
@given(st.integers(1, 80), st.data())
def test_stages_share_the_layers(num_layers: int, data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, num_layers))
    stages = stage_layers(num_layers, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes) or sizes[-1] == max(sizes) == min(sizes)
