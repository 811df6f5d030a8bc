"""A tiny chat model, and conversations with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from recipes.quickstart.model import ModelShape, make_model, make_tokenizer
from workers.agents.config import EpisodeConfig
from workers.agents.model import Draw, Drawn, Limits, Model, Request
from workers.agents.renderer import Renderer
from workers.text import ResponseReader

QWEN = (
    "{%- if tools %}{{ '<|system|>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|end|>\n' }}{% endif %}"
    "{%- for message in messages %}{% if message.role == 'tool' %}"
    "{{ '<|user|><tool_response>\n' + message.content + '\n</tool_response><|end|>\n' }}"
    "{%- else %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endif %}"
    "{% endfor %}{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""A template of Qwen's form: a line break stands behind the token that ends a turn."""
STRIPS = (
    "{%- set last = namespace(user=0) %}{%- for message in messages %}"
    "{%- if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and loop.index0 < last.user and '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|' + message.role + '|>\n' + content + '<|end|>\n' }}"
    "{% endfor %}{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""A template that leaves out thoughts of turns before a user's last message, as Qwen3's."""
ENDLESS = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""A template without a token that ends a turn."""


def chat_model(
    directory: Path, template: str = QWEN, *, max_tokens: int = 256, hidden_size: int = 32
) -> Path:
    """A random Qwen2 of two small layers over bytes."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    shape = ModelShape(
        hidden_size=hidden_size,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        max_tokens=max_tokens,
    )
    make_model(tokenizer, shape, seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tasks(path: Path, rows: int = 8) -> Path:
    lines = []
    for row in range(rows):
        prompt = [{"role": "user", "content": f"Count to {row}."}]
        lines.append(json.dumps({"prompt": prompt, "answer": str(row)}) + "\n")
    path.write_text("".join(lines))
    return path


def chat_settings(directory: Path) -> dict[str, object]:
    """Settings of recipes.grpo in this process on the chat model, with engine hf."""
    return {
        "runtime": "local",
        "model.path": chat_model(directory / "model"),
        "data.train": tasks(directory / "tasks.jsonl"),
        "data.batch_size": 4,
        "algorithm.samples_per_prompt": 2,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 6,
        "actor.train.precision": "fp32",
        "actor.train.optimizer.learning_rate": 1e-3,
        "actor.consistency": "error",
        "metrics.tensorboard": False,
        "metrics.console": False,
    }


def conversation(
    draw: Draw,
    *,
    template: str = QWEN,
    config: EpisodeConfig | None = None,
    reply_tokens: int = 8,
    sampled_tokens: int = 10_000,
    context_tokens: int = 1000,
    row: int = 0,
) -> Model:
    """A model whose replies come from `draw`."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return Model(
        row=row,
        draw=draw,
        renderer=Renderer(tokenizer),
        read=ResponseReader(tokenizer, [tokenizer.eos_token_id]),
        end_token_ids=frozenset([tokenizer.eos_token_id]),
        config=config or EpisodeConfig(),
        limits=Limits(
            reply_tokens=reply_tokens,
            sampled_tokens=sampled_tokens,
            context_tokens=context_tokens,
        ),
        vocab_size=len(tokenizer),
    )


def drawn(text: str, *, limit: int = 1000) -> Drawn:
    """A reply with its end token, cut at `limit` tokens."""
    tokenizer = make_tokenizer()
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    cut = ids[:limit]
    return Drawn(
        ids=cut,
        log_probs=[-0.5] * len(cut),
        stopped=len(cut) == len(ids),
        weight_versions=[0] * len(cut),
    )


def saying(texts: Sequence[str]) -> Draw:
    """Replies with these texts, one after the other."""
    left = iter(texts)

    async def draw(request: Request) -> Drawn:
        return drawn(next(left), limit=request.limit)

    return draw
