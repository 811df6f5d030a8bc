"""The families of models whose images are known: how a prompt's text holds an image, and which part of
the model sees it.

A family is an entry here. Its processor's files say sizes; transformers' own code computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from workers.config import ModelConfig
from workers.published import read_config

QWEN_IMAGE = "<|image_pad|>"
GEMMA_BEGIN, GEMMA_IMAGE, GEMMA_END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFamily:
    """How a family of models sees images."""

    placeholder: str
    """The chat template's text for an image."""
    expanded: Callable[[int], str]
    """Number of an image's tokens -> the text in the placeholder's place that has them."""
    token: str
    """The name of the token's id in the model's configuration."""
    token_text: str
    """The token's text."""
    tower: tuple[str, ...]
    """The parts of the model that are not its decoder: the tower, and the projector that brings its
    features to the decoder's width, where that is not inside the tower."""
    token_count: str = ""
    """The name of the number of tokens of every image in the model's configuration; empty where it
    depends on the image's size, and tokens have three positions: time, height and width."""
    sees_itself: bool = False
    """The tokens of an image see each other; otherwise each sees those before it, as text does."""
    generators: tuple[str, ...] = ("hf", "vllm")
    """The generation engines that take its images."""
    decoder: str = ""
    """The family of text models whose layers the decoder has, where transformers says how those are
    split over ranks and not how the decoder's are."""

    @property
    def is_rotary(self) -> bool:
        """Whether tokens have three positions."""
        return not self.token_count


def _qwen(num_tokens: int) -> str:
    return QWEN_IMAGE * num_tokens


def _gemma(num_tokens: int) -> str:
    return f"\n\n{GEMMA_BEGIN}{GEMMA_IMAGE * num_tokens}{GEMMA_END}\n\n"


QWEN = ImageFamily(
    placeholder=QWEN_IMAGE,
    expanded=_qwen,
    token="image_token_id",
    token_text=QWEN_IMAGE,
    tower=("visual",),
)
GEMMA = ImageFamily(
    placeholder=GEMMA_BEGIN,
    expanded=_gemma,
    token="image_token_index",
    token_text=GEMMA_IMAGE,
    tower=("vision_tower", "multi_modal_projector"),
    token_count="mm_tokens_per_image",
    sees_itself=True,
    generators=("hf",),
)
FAMILIES: dict[str, ImageFamily] = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": replace(QWEN, decoder="qwen3"),
    "qwen3_vl_moe": QWEN,
    "gemma3": GEMMA,
}
"""model_type -> family."""


def family_of(config: PretrainedConfig) -> ImageFamily | None:
    """The family of a model with images; None for any other, which is given text alone."""
    return FAMILIES.get(config.model_type)


def sees_images(model: ModelConfig) -> bool:
    """Whether the model is of a known family. A model that can't be read is none: where it is
    needed, model_config says so in one line."""
    try:
        config = published_config(model)
    except (OSError, ValueError):
        return False
    return family_of(config) is not None


def published_config(model: ModelConfig) -> PretrainedConfig:
    """The checkpoint's configuration, that of its vision tower included."""
    return read_config(model)


def image_token_id(config: PretrainedConfig, family: ImageFamily) -> int:
    """The token that an image's tokens are in a prompt."""
    return int(config.to_dict()[family.token])
