"""Recording weight loaders: copies of slices become boxes, anything else is an error that names the
parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from hybridflow.resharding import Box
from workers.generation.vllm.shard_map import LoaderError, LoaderWrite, Region, missing, record

Load = Callable[[nn.Parameter, torch.Tensor], None]
SHAPES = {"q": (8, 4), "kv": (4, 4), "bias": (6,)}


class Fused(nn.Module):
    """A rank's part (1 of 2) of a fused projection and a replicated bias, as an inference
    engine keeps them."""

    def __init__(self, load: dict[str, Load] | None = None) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.empty(6, 4, device="meta"), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(8, device="meta"), requires_grad=False)
        self.load = {"q": self.load_q, "kv": self.load_kv, "bias": self.load_bias} | (load or {})

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            if name in self.load:
                self.load[name](self.bias if name == "bias" else self.fused, weight)

    @staticmethod
    def load_q(parameter: nn.Parameter, weight: torch.Tensor) -> None:
        parameter.data.narrow(0, 0, 4).copy_(weight.narrow(0, 4, 4))

    @staticmethod
    def load_kv(parameter: nn.Parameter, weight: torch.Tensor) -> None:
        parameter.data[4:].copy_(weight.chunk(2)[1])

    @staticmethod
    def load_bias(parameter: nn.Parameter, weight: torch.Tensor) -> None:
        parameter[:6].data.copy_(weight)
        parameter[6:].data.fill_(0)


def test_slices_become_boxes() -> None:
    assert record(Fused(), SHAPES, torch.float32) == [
        LoaderWrite(
            name="q",
            box=Box((4, 0), (4, 4)),
            tensor="fused",
            region=Region(size=(4, 4), stride=(4, 1), offset=0),
        ),
        LoaderWrite(
            name="kv",
            box=Box((2, 0), (2, 4)),
            tensor="fused",
            region=Region(size=(2, 4), stride=(4, 1), offset=16),
        ),
        LoaderWrite(
            name="bias",
            box=Box((0,), (6,)),
            tensor="bias",
            region=Region(size=(6,), stride=(1,), offset=0),
        ),
    ]


def test_columns_and_single_elements() -> None:
    def columns(parameter: nn.Parameter, weight: torch.Tensor) -> None:
        parameter.data[:4, 2:].copy_(weight[4:, :2])
        parameter.data[:4, :2].copy_(weight[4:, 2:])

    placements = record(Fused({"q": columns}), SHAPES, torch.float32)
    assert [placement.box for placement in placements if placement.name == "q"] == [
        Box((4, 0), (4, 2)),
        Box((4, 2), (4, 2)),
    ]
    assert placements[0].region == Region(size=(4, 2), stride=(4, 1), offset=2)


def test_a_transposed_matrix_is_written_down_its_columns() -> None:
    """As GPT-2's checkpoints have theirs: element (i, j) of the parameter is (j, i) of the model's
    matrix."""

    def transposed(parameter: nn.Parameter, weight: torch.Tensor) -> None:
        parameter.data[:4].copy_(weight[4:].t())

    placements = record(Fused({"q": transposed}), SHAPES, torch.float32)
    (placement,) = [placement for placement in placements if placement.name == "q"]
    assert placement.box == Box((4, 0), (4, 4))
    assert placement.region == Region(size=(4, 4), stride=(1, 4), offset=0)
    weight, matrix = torch.arange(32.0).view(8, 4), torch.zeros(6, 4)
    region = placement.region
    matrix.as_strided(region.size, region.stride, region.offset).copy_(weight[4:])
    assert torch.equal(matrix[:4], weight[4:].t())


def test_one_expert_of_a_stack_is_a_box_without_an_axis() -> None:
    """Mixtures of experts: [experts, 2 x rows, columns] in transformers, one matrix of each kind and
    expert in files, gate above up in the engine, the second expert's transposed here."""
    stack = torch.arange(3.0 * 4 * 5).reshape(3, 4, 5)

    class Model(nn.Module):
        def __init__(self, device: str) -> None:
            super().__init__()
            self.ups = nn.Parameter(torch.zeros(3, 2, 5, device=device))
            self.gates = nn.Parameter(torch.zeros(3, 5, 2, device=device))

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for name, tensor in weights:
                expert, kind = int(name[0]), name[1:]
                if kind == "up":
                    self.ups.data[expert].copy_(tensor)
                else:
                    self.gates.data[expert].copy_(tensor.t().contiguous())

    def split(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        matrices = {}
        for expert, matrix in enumerate(parameters["stack"].unbind()):
            gate, up = (half.contiguous() for half in matrix.chunk(2))
            matrices |= {f"{expert}gate": gate, f"{expert}up": up}
        return matrices

    model, loaded = Model("meta"), Model("cpu")
    placements = record(model, {"stack": (3, 4, 5)}, torch.float32, split)
    loaded.load_weights(split({"stack": stack}).items())
    assert len(placements) == 6
    written = Model("cpu")
    for placement in placements:
        assert placement.box.shape == (1, 2, 5)
        memory, region = written.get_parameter(placement.tensor).data, placement.region
        place = memory.as_strided(region.size, region.stride, region.offset)
        place.copy_(stack[placement.box.slices])
    assert torch.equal(written.ups, loaded.ups) and torch.equal(written.gates, loaded.gates)


@pytest.mark.parametrize(
    ("name", "load", "message"),
    [
        ("q", lambda p, w: p.data[:4].copy_(w[4:] * 2), "q: its weight loader applies aten.mul"),
        (
            "q",
            lambda p, w: p.data[:4].copy_(w[4:].to(torch.bfloat16)),
            "q: its weight loader applies aten._to_copy",
        ),
        (
            "q",
            lambda p, w: p.data[:4].copy_(torch.cat([w[4:6], w[6:]])),
            "q: its weight loader applies aten.cat",
        ),
        (
            "q",
            lambda p, w: p.data[0].copy_(w[:4].diagonal()),
            "q: its weight loader stores a view of shape .* which is no box",
        ),
        ("q", lambda p, w: p.data[:4].copy_(w[::2]), "q: its weight loader stores a view"),
        ("q", lambda p, w: p.data[:4].copy_(w[0]), "q: its weight loader broadcasts"),
        (
            "q",
            lambda p, w: torch.empty(4, 4, device="meta").copy_(w[:4]),
            "q: its weight loader copies it into something",
        ),
        (
            "q",
            lambda p, w: (Fused.load_q(p, w), p.data.add_(1)),
            "fused: a weight loader applies aten.add_",
        ),
        (
            "q",
            lambda p, w: p.data[:4].copy_(torch.ones(4, 4, device="meta")),
            "fused: a weight loader fills it from something",
        ),
        (
            "q",
            lambda p, w: p.data[:3].copy_(w[4:7]),
            "fused: the loaders write 20 of its 24 elements",
        ),
        (
            "q",
            lambda p, w: (Fused.load_q(p, w), Fused.load_q(p, w)),
            "fused: the loaders write 40 of its 24 elements",
        ),
    ],
)
def test_anything_else_is_an_error_with_the_name(name: str, load: Load, message: str) -> None:
    with pytest.raises(LoaderError, match=message):
        record(Fused({name: load}), SHAPES, torch.float32)


def test_parameters_that_a_rank_does_not_take() -> None:
    placements = record(Fused(), {**SHAPES, "other.stage": (3, 3)}, torch.float32)
    assert missing(placements, [*SHAPES, "other.stage"]) == ["other.stage"]
