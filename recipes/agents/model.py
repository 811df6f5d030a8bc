"""The tokenizer of the agents' tiny model: the quickstart's bytes, a token for each frame of a tool
call, and a chat template of Qwen's form."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import Qwen2Tokenizer

from recipes.quickstart.model import make_tokenizer

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' %}"
    "{{ '<|user|><tool_response>' + message.content + '</tool_response><|end|>' }}"
    "{%- else %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A model of a million parameters is not told of its tools: demonstrations show them."""
TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def make_agent_tokenizer(frames: Sequence[str]) -> Qwen2Tokenizer:
    """`frames`: texts that are a token each, such as the name of a tool with its quotes."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([*TOKENS, *frames])
    tokenizer.add_tokens([f"<unused{number}>" for number in range(-len(tokenizer) % 8)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
