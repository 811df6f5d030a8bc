"""Reads prompts, demonstrations or preference pairs from files or the hub into batches of
token sequences.

    tokenizer = load_tokenizer(config.model)
    dataset = PromptDataset.load(config.data, config.data.train, tokenizer)
    loader = RowLoader(dataset, config.data)
    batch = next(loader)                                   # Batch: prompt_ids, uid, extras

Leaves out responses, rewards and anything distributed: this runs in the controller's process.
"""

from controllers.data.config import DataConfig, EqualPairs, Overlong
from controllers.data.dataset import PromptDataset
from controllers.data.demonstrations import DemonstrationDataset
from controllers.data.loader import RowLoader
from controllers.data.pairs import PairDataset, SafetyPairDataset
from controllers.data.rows import RowDataset
from controllers.data.tasks import TaskDataset
from workers.tokenizer import load_tokenizer

__all__ = [
    "DATASETS",
    "DataConfig",
    "DemonstrationDataset",
    "EqualPairs",
    "Overlong",
    "PairDataset",
    "PromptDataset",
    "RowDataset",
    "RowLoader",
    "SafetyPairDataset",
    "TaskDataset",
    "load_tokenizer",
]

DATASETS: dict[str, type[RowDataset]] = {
    "prompts": PromptDataset,
    "tasks": TaskDataset,
    "demonstrations": DemonstrationDataset,
    "pairs": PairDataset,
    "safety_pairs": SafetyPairDataset,
}
"""The kinds of data that an algorithm can train on, by name (controllers.AlgorithmEntry.rows)."""
