"""What a vision tower derives from the sizes of images, made on the host.

transformers' towers make positions, windows and the lengths of images from a tensor of sizes, and ask
it for numbers: with sizes on a GPU each of them is a wait for the device, three in every layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

PREFIX = "image_"
"""transformers' prefix of a tower's keyword arguments."""


def tower_arguments(tower: nn.Module, grids: Tensor, pixels: Tensor) -> dict[str, Any]:
    """Keyword arguments of get_image_features in the place of what the tower would make itself.

    `grids`: int64 [images, 3] on the host, patches along time, height and width.
    """
    assert grids.device.type == "cpu", "sizes on a device are asked for one by one"
    parts: Any = tower
    device, config = pixels.device, parts.config
    sizes, merge = config.to_dict(), int(config.spatial_merge_size)
    lengths = {"cu_seqlens": get_vision_cu_seqlens(grids)}
    places = {"position_ids": get_vision_position_ids(grids, merge)}
    if "window_size" in sizes:
        index, windows = get_vision_window_index(
            grids, merge, int(config.window_size), int(config.patch_size)
        )
        places["window_index"], lengths["cu_window_seqlens"] = index, windows
    if "num_position_embeddings" in sizes:
        places["interp_indices"], places["interp_weights"] = (
            get_vision_interpolation_indices_and_weights(
                grids,
                num_grid_per_side=parts.num_grid_per_side,
                mode=parts.interpolation_mode,
                align_corners=parts.interpolation_align_corners,
                spatial_merge_size=merge,
            )
        )
    arguments: dict[str, Any] = {}
    for name, tensor in places.items():
        arguments[name] = tensor.to(device)
    for name, ends in lengths.items():
        arguments[name] = ends
        if is_flash_attention_requested(config):  # which reads them on the device
            arguments[name] = ends.to(device)
            longest = name.replace("cu_", "max_")
            arguments[longest] = int((ends[1:] - ends[:-1]).max())
    return {f"{PREFIX}{name}": value for name, value in arguments.items()}
