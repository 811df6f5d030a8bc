"""Prompts: from parquet, jsonl or the hub to batches of token sequences.

    tokenizer = load_tokenizer(config.model)
    dataset = PromptDataset.load(config.data, config.data.train, tokenizer)
    loader = PromptLoader(dataset, config.data)
    batch = next(loader)                                   # PromptBatch: prompt_ids, uid, row, extras

Leaves out responses, rewards and anything distributed: this runs in the controller's process.
"""

from controllers.data.config import DataConfig, Overlong
from controllers.data.dataset import PromptBatch, PromptDataset
from controllers.data.loader import PromptLoader
from controllers.data.tokenize import load_tokenizer

__all__ = ["DataConfig", "Overlong", "PromptBatch", "PromptDataset", "PromptLoader", "load_tokenizer"]
