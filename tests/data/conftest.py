"""A tokenizer tokenizer on the spot: the quickstart's, with a beginning-of-sequence token so
that special tokens show."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import Qwen2Tokenizer

from recipes.quickstart.model import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Qwen2Tokenizer:
    tokenizer = make_tokenizer()
    system = tokenizer.convert_tokens_to_ids("<|system|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", system)]
    )
    return tokenizer
