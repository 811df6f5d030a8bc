"""Tokenizers whose words are numbers, for models of any family."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1003
BOS, EOS, PAD = 0, 1, 2
FIRST_WORD = 16
"""The first number that prompts have."""
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE ' }}{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
TOKENS = {
    "<|vision_start|>": 4,
    "<|vision_end|>": 5,
    "<|image_pad|>": 6,
    "<|video_pad|>": 7,
    "<start_of_image>": 8,
    "<end_of_image>": 9,
    "<image_soft_token>": 10,
}
"""The tokens of images in the tokenizers of models that see them."""


def make_tokenizer(directory: Path, size: int = VOCABULARY, image: str = "") -> Path:
    """A tokenizer whose words are numbers, in a folder of its own: beside a model AutoTokenizer would
    make one of its family of it. `image`: what its chat template writes for an image."""
    vocabulary = {str(i): i for i in range(size)}
    if image:
        named = {number: name for name, number in TOKENS.items()}
        vocabulary = {named.get(i, str(i)): i for i in range(size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if image:
        words.add_special_tokens([AddedToken(name, special=True) for name in TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=str(BOS), eos_token=str(EOS), pad_token=str(PAD)
    )
    if image:
        tokenizer.chat_template = TEMPLATE.replace("IMAGE", image)
    tokenizer.save_pretrained(directory)
    return directory
