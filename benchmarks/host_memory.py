"""The memory of a host process on a CPU that dry_run predicts, beside what the system counts, for
models and engines of different shapes.

    python -m benchmarks.host_memory --json FILE [--shapes NAME ...]

Two hosts on Ray, float32, two steps of 8 prompts x 4 samples with 128 new tokens (PPO: 2 samples,
384 tokens; recompute: 512; step: the batch of benchmarks.step's 30 M); random Llama models, and a
Mixtral. Rows of {shape, measured_bytes, predicted_bytes, all_bytes}: the largest host, its
prediction, all processes of the run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.step.case import PeakMemory
from recipes.preparation import foresee, prepare
from recipes.python_settings import make_settings
from recipes.quickstart.model import make_tokenizer
from recipes.session import Session

MAX_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and what trains and generates with it; engines fsdp and hf unless settings name
    others."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = False
    experts: int = 0
    recipe: str = "grpo"
    settings: dict[str, object] = field(default_factory=dict)


SHAPES = {
    "deep": Shape(
        hidden=256, inner=1024, layers=16, heads=8, key_value_heads=4, vocabulary=32768
    ),
    "wide": Shape(
        hidden=1024, inner=4096, layers=4, heads=16, key_value_heads=8, vocabulary=1024
    ),
    "tensor": Shape(
        hidden=512, inner=2048, layers=8, heads=8, key_value_heads=4, vocabulary=16384,
        settings={
            "actor.train.engine": "threed", "actor.train.tp": 2,
            "actor.generation.engine": "vllm", "actor.generation.tp": 2,
        },
    ),
    "critic": Shape(
        hidden=512, inner=2048, layers=6, heads=8, key_value_heads=4, vocabulary=8192,
        recipe="ppo",
        settings={
            "critic.train.precision": "fp32", "algorithm.samples_per_prompt": 2,
            "actor.generation.sampling.max_response_tokens": 384,
        },
    ),
    "vocabulary": Shape(
        hidden=256, inner=768, layers=4, heads=4, key_value_heads=1, vocabulary=131072, tied=True,
        settings={"actor.generation.engine": "vllm"},
    ),
    "deepspeed": Shape(
        hidden=512, inner=1536, layers=8, heads=8, key_value_heads=4, vocabulary=8192,
        settings={"actor.train.engine": "deepspeed", "actor.train.zero_stage": 2},
    ),
    "pipeline": Shape(
        hidden=512, inner=2048, layers=8, heads=8, key_value_heads=4, vocabulary=8192,
        settings={"actor.train.engine": "threed", "actor.train.pp": 2},
    ),
    "adapter": Shape(
        hidden=768, inner=2048, layers=12, heads=12, key_value_heads=4, vocabulary=16384,
        settings={"actor.train.lora.rank": 8},
    ),
    "zero3": Shape(
        hidden=768, inner=2048, layers=8, heads=12, key_value_heads=4, vocabulary=32768,
        settings={"actor.train.reshard_after_forward": True},
    ),
    "layered": Shape(
        hidden=896, inner=2688, layers=12, heads=14, key_value_heads=2, vocabulary=16384,
    ),
    "stages": Shape(
        hidden=768, inner=2048, layers=12, heads=12, key_value_heads=4, vocabulary=16384,
        settings={
            "actor.train.engine": "threed", "actor.train.pp": 2, "actor.train.lora.rank": 16,
        },
    ),
    "pools": Shape(
        hidden=768, inner=2048, layers=6, heads=12, key_value_heads=12, vocabulary=8192,
        settings={
            "placement": "custom", "num_devices": 1,
            "pools": {
                "train": {"num_devices": 1, "roles": ["actor", "reference", "reward"]},
                "samples": {"num_devices": 1, "roles": ["generation"]},
            },
        },
    ),
    "recompute": Shape(
        hidden=640, inner=1728, layers=10, heads=10, key_value_heads=5, vocabulary=16384,
        settings={
            "actor.train.activation_checkpointing": True,
            "actor.generation.sampling.max_response_tokens": 512,
            "actor.generation.engine": "vllm",
        },
    ),
    "experts": Shape(
        hidden=512, inner=1024, layers=6, heads=8, key_value_heads=4, vocabulary=8192, experts=4,
    ),
    "step": Shape(
        hidden=512, inner=2048, layers=8, heads=8, key_value_heads=4, vocabulary=512,
        settings={
            "data.batch_size": 32, "algorithm.samples_per_prompt": 8,
            "actor.generation.engine": "vllm",
            "actor.generation.sampling.max_response_tokens": 64,
        },
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.shapes:
        with tempfile.TemporaryDirectory() as directory:
            rows.append({"shape": name, **measure(SHAPES[name], Path(directory))})
        measured, predicted = rows[-1]["measured_bytes"], rows[-1]["predicted_bytes"]
        print(
            f"{name:>10}  measured {measured / 1e9:.2f} GB, predicted {predicted / 1e9:.2f} GB "
            f"({predicted / measured - 1:+.0%})",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(shape: Shape, directory: Path) -> dict[str, float]:
    """Peak bytes of the run's largest host, those predicted of it, and all processes' together."""
    make_inputs(shape, directory)
    settings: dict[str, object] = {
        "model.path": directory / "model",
        "data.train": directory / "prompts.jsonl",
        "data.answer_column": None,
        "data.batch_size": 8,
        "algorithm.samples_per_prompt": 4,
        "num_devices": 2,
        "runtime": "ray",
        "cluster.address": "local",
        "actor.train.precision": "fp32",
        "actor.generation.precision": "fp32",
        "actor.generation.engine": "hf",
        "actor.generation.sampling.max_response_tokens": 128,
        "actor.generation.sampling.ignore_eos": True,
        "loop.num_steps": 2,
        "loop.resume": "never",
        "metrics.console": False,
        "metrics.tensorboard": False,
        "output_dir": directory / "run",
    }
    config = make_settings(
        shape.recipe, settings | shape.settings, reward="benchmarks.step.reward:score"
    )
    predicted = foresee(config)
    with PeakMemory() as memory, Session(prepare(config)) as session:
        session.step()
        session.step()  # with the optimizer's states, which the first one makes
    return {
        "measured_bytes": memory.largest_process_bytes("ray::"),
        "predicted_bytes": max(predicted.process_bytes.values()),
        "all_bytes": memory.peak_bytes,
    }


def make_inputs(shape: Shape, directory: Path) -> None:
    """A random model with a byte tokenizer, and prompts of eight digits."""
    tokenizer = make_tokenizer()
    more = {"num_local_experts": shape.experts, "sliding_window": None} if shape.experts else {}
    config = AutoConfig.for_model(
        "mixtral" if shape.experts else "llama",
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    lines = [json.dumps({"prompt": f"{number:08d}"}) for number in range(64)]
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
