"""axis_group: the process group of the ranks that differ along some axes of a layout."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import ProcessGroup

from hybridflow.layout import Layout


def axis_group(layout: Layout, *axes: str) -> ProcessGroup:
    """This rank's group along `axes`, in rank order; collective over all ranks of the layout."""
    groups = [list(ranks) for ranks in layout.groups(*axes)]
    group, _ = dist.new_subgroups_by_enumeration(groups)
    assert group is not None, "every rank is in one group"
    return group
