"""prepare(): the model and the data of one of the tasks, made in a directory."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.agents import calculator, documents
from recipes.agents.model import make_agent_tokenizer
from recipes.quickstart.model import ModelShape, make_model
from recipes.quickstart.warm_start import Row, WarmStartConfig, imitate
from workers.agents.renderer import Message, Renderer
from workers.quiet import quiet

NUM_TRAIN, NUM_TEST = 4096, 128
IMITATED = ("demonstration", "reading")
"""The parts of a row that the warm start imitates; they are no columns of the data."""
LEARNING_RATE = 6e-3
"""The learning rate of the warm start, which teaches a small model to copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentTask:
    """How one of the tasks is made and run."""

    environments: dict[str, str]
    """Interface -> environment=..."""
    make_row: Callable[[random.Random], dict[str, Any]]
    frames: Sequence[str]
    max_reply_tokens: int
    max_tokens: int
    """Prompt, replies and observations together."""
    warm_start_steps: int


TASKS = {
    "calculator": AgentTask(
        environments={
            "tools": "recipes.agents.calculator:Calculator",
            "function": "recipes.agents.calculator:by_hand",
            "endpoint": "recipes.agents.by_url:episode",
        },
        make_row=calculator.make_row,
        frames=calculator.FRAMES,
        max_reply_tokens=calculator.MAX_REPLY_TOKENS,
        max_tokens=calculator.MAX_TOKENS,
        warm_start_steps=800,
    ),
    "documents": AgentTask(
        environments={"environment": "recipes.agents.documents:Library"},
        make_row=documents.make_row,
        frames=documents.FRAMES,
        max_reply_tokens=documents.MAX_REPLY_TOKENS,
        max_tokens=documents.MAX_TOKENS,
        warm_start_steps=1200,
    ),
}


def prepare(name: str, directory: Path, *, seed: int = 0) -> dict[str, str]:
    """Makes DIRECTORY/model, train.jsonl and test.jsonl; the settings that name them. What an
    earlier call made is taken as it is."""
    task, done = TASKS[name], directory / "prepared.json"
    paths = {
        "model.path": str(directory / "model"),
        "data.train": str(directory / "train.jsonl"),
        "data.validation": str(directory / "test.jsonl"),
    }
    if done.is_file():
        return paths
    directory.mkdir(parents=True, exist_ok=True)
    random_ = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < NUM_TRAIN + NUM_TEST:
        row = task.make_row(random_)
        rows.setdefault(row["prompt"][0]["content"] + row["answer"], row)
    tokenizer = make_agent_tokenizer(task.frames)
    renderer = Renderer(tokenizer)
    model = make_model(tokenizer, shape_of(task), seed)
    train, test = list(rows.values())[:NUM_TRAIN], list(rows.values())[NUM_TRAIN:]
    demonstrations = []
    for row in train:
        for imitated in IMITATED:
            if imitated in row:
                demonstrations.append(demonstration_row(renderer, row["prompt"], row[imitated]))
    config = WarmStartConfig(num_steps=task.warm_start_steps, learning_rate=LEARNING_RATE)
    imitate(model, demonstrations, config, seed)
    with quiet():
        model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    for path, part in ((paths["data.train"], train), (paths["data.validation"], test)):
        lines = []
        for row in part:
            columns = {key: value for key, value in row.items() if key not in IMITATED}
            lines.append(json.dumps(columns) + "\n")
        Path(path).write_text("".join(lines))
    done.write_text(json.dumps({"task": name, "seed": seed}) + "\n")
    return paths


def shape_of(task: AgentTask) -> ModelShape:
    """Two layers, the fewest that can copy; 144 thousand parameters."""
    return ModelShape(
        hidden_size=64,
        intermediate_size=192,
        num_layers=2,
        num_heads=2,
        max_tokens=task.max_tokens,
    )


def demonstration_row(
    renderer: Renderer, prompt: Sequence[Message], demonstration: Sequence[tuple[str, str]]
) -> Row:
    """The demonstration's tokens, of which the assistant's are learned; `shown` is the role of
    words of the assistant's that are not."""
    history = list(prompt)
    ids = renderer.start(history)
    learned = [False] * len(ids)
    new: list[dict[str, Any]] = []
    for role, content in demonstration:
        if role not in ("assistant", "shown"):
            new.append({"role": role, "content": content})
            continue
        if new:
            between = renderer.extend(history, new)
            ids, learned = ids + between, learned + [False] * len(between)
            history += new
            new = []
        said = renderer.tokenizer.encode(content, add_special_tokens=False)
        said.append(renderer.tokenizer.eos_token_id)
        ids, learned = ids + said, learned + [role == "assistant"] * len(said)
        history.append({"role": "assistant", "content": content})
    return ids, learned


def settings(name: str, interface: str) -> dict[str, object]:
    """The recipe's settings besides model and data, as a user would write them behind `python -m
    recipes.grpo`."""
    task = TASKS[name]
    return {
        "environment": task.environments[interface],
        "episode.max_turns": 4,
        "actor.generation.max_model_len": task.max_tokens,
        "actor.generation.sampling.max_response_tokens": task.max_reply_tokens,
        "actor.generation.precision": "fp32",
        "actor.train.precision": "fp32",
        "actor.train.optimizer.learning_rate": 5e-4,
        "data.batch_size": 32,
        "algorithm.samples_per_prompt": 8,
        "algorithm.num_mini_batches": 2,
        "loop.num_steps": 30,
        "loop.validate_every": 10,
        "metrics.tensorboard": False,
    }
