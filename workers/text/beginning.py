"""What a tokenizer puts before a text, and a chat template with its options inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

PROBE = "0 a"


class Beginning:
    """The tokens that a tokenizer puts before a text (a beginning-of-sequence token, mostly):

        ids = Beginning(tokenizer).before(tokenizer(text, add_special_tokens=False)["input_ids"])

    What it puts after a text (add_eos_token, [SEP]) is left out: a prompt does not end there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        whole = list(tokenizer(PROBE)["input_ids"])
        bare = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
        self.ids: list[int] = []
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                self.ids = whole[:start]
                break

    def before(self, ids: list[int]) -> list[int]:
        """The tokens of a whole text; where the text itself spells the beginning, it has one."""
        if not self.ids or ids[: len(self.ids)] == self.ids:
            return ids
        return self.ids + ids


def bake_options(template: Any, options: Mapping[str, Any]) -> Any:
    """A chat template (or several by name) in which the options are the defaults of variables of
    that name, so that whoever uses it without them gets the same text."""
    if not options or template is None:
        return template
    if isinstance(template, dict):
        return {name: bake_options(text, options) for name, text in template.items()}
    assignments = []
    for name, value in options.items():
        assignments.append(f"{{%- set {name} = {name} if {name} is defined else {value!r} %}}\n")
    head = "".join(assignments)
    if template.startswith(head):
        return template
    return head + template
