"""Layout against the paper's worked examples and a naive enumeration."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.layout import Layout


def test_papers_training_groups() -> None:
    layout = Layout.of(dp=2, pp=1, tp=4)
    assert layout.groups("tp") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert layout.groups("dp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert Layout.of(order=("pp", "dp", "cp", "tp"), pp=2, dp=2, tp=2).groups("pp") == [
        (0, 4),
        (1, 5),
        (2, 6),
        (3, 7),
    ]


@given(
    st.permutations(["dp", "pp", "cp", "tp"]), st.lists(st.integers(1, 3), min_size=4, max_size=4)
)
def test_coordinates_and_ranks_are_inverse_and_groups_partition(
    order: list[str], sizes: list[int]
) -> None:
    layout = Layout.of(order=tuple(order), **dict(zip(order, sizes, strict=True)))
    seen = []
    for rank in range(layout.size):
        here = layout.coordinates(rank)
        assert layout.rank(**here) == rank
        seen.append(tuple(here.values()))
        assert rank in layout.group(rank, "tp", "dp")
    assert seen == sorted(set(seen))
    for axes in (("tp",), ("dp", "pp"), ("dp", "pp", "cp", "tp")):
        groups = layout.groups(*axes)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.size))
        for group in groups:
            assert (
                len(
                    {
                        tuple(v for k, v in layout.coordinates(rank).items() if k not in axes)
                        for rank in group
                    }
                )
                == 1
            )


@given(
    st.integers(1, 3), st.integers(1, 4), st.lists(st.sampled_from("abc"), min_size=12, max_size=12)
)
def test_torn_groups_by_counting(dp: int, tp: int, names: list[str]) -> None:
    """G35: Ray packs 5 + 3 free GPUs as two nodes, and ranks 4 to 7 lie on both."""
    assert Layout.of(dp=2, tp=4).torn("tp", ["a"] * 5 + ["b"] * 3) == (4, 5, 6, 7)
    assert Layout.of(dp=2, tp=4).torn("tp", ["a"] * 4 + ["b"] * 4) == ()
    assert Layout.of(tp=4).torn("tp", ["a", "a", "b", "b"]) == (), "no node has four"
    nodes = sorted(names[: dp * tp])
    torn = []
    for first in range(0, dp * tp, tp):
        here = nodes[first : first + tp]
        if here[0] != here[-1] and any(nodes.count(node) >= tp for node in nodes):
            torn.append(tuple(range(first, first + tp)))
    assert Layout.of(dp=dp, tp=tp).torn("tp", nodes) == (torn[0] if torn else ())


def test_bad_layouts_are_named() -> None:
    with pytest.raises(ValueError, match="unknown axes \\['ep'\\]"):
        Layout.of(ep=2)
    with pytest.raises(ValueError, match="'tp' has size 0"):
        Layout.of(tp=0)
    with pytest.raises(ValueError, match="rank 8 is outside"):
        Layout.of(dp=8).coordinates(8)
