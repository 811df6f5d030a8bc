"""docs/models.md from the rows of benchmarks.families."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from benchmarks.families.case import CASES
from benchmarks.families.family import Family
from benchmarks.families.models import FAMILIES

Rows = Mapping[tuple[str, str], Mapping[str, Any]]
"""(family, case) -> row."""

HEAD = """# Models

Any causal language model that transformers loads can be trained; vLLM generates for the families
that it knows, or through its Transformers backend. `dry_run=true` says in seconds whether a model
fits its settings: everything that is refused is refused there, in one line.

- **Precision.** `auto` computes in bfloat16 where the device does so natively, in float32
  elsewhere ([recipes.md](recipes.md)). The saved model has the data type of the one that you
  gave; `model.dtype=float32`, `bfloat16` or `float16` set another. Checkpoints that a run is
  resumed from are float32.
- **Packing.** Families marked *padded* need `ROLE.train.packing=false` for every role: their
  layers can't be told where the sequences of a packed row begin.
- **Critics and reward models** of a family for which transformers has no sequence classifier are
  its decoder with a linear head, under the class name that transformers would give it.
- **Directories.** Names and shapes of all weights are held against `config.json` before anything
  is loaded, by transformers' rules (prefixes, tied weights, stacked experts, safetensors or
  `pytorch_model.bin`). What is missing, unknown or of another shape is refused by name, and so are
  quantized weights, adapters in place of a model, GGUF files, two embeddings where
  `tie_word_embeddings` is true.
- **Score heads** are `score.weight`, one label; heads of other names (TRL's `v_head.summary`) or of
  several labels are refused: transformers would draw a new one at random.
- **Lengths.** `actor.generation.max_model_len` is the longest prompt with `max_response_tokens`,
  and the key/value cache of a CPU what the rows of a step need, unless you set them.
- **States.** Layers that carry a state (Mamba and Mamba 2, and the hybrids: Bamba, Falcon-H1, Jamba,
  Nemotron-H, Granite 4, Zamba 2, OLMo Hybrid, Qwen 3 Next, Qwen 3.5) generate with engine hf, which
  reads rows of equal length together. Qwen 3.5 is further from its generation in float32 (1.6e-5)
  than a row of the table may be; transformers' own pass is 3e-5 from the same in float64.
- **Images.** Prompts of families marked *images* have up to two ([images.md](images.md)).
- **generation.tp** divides the attention heads, the width of the MLP and the vocabulary (padded
  to 64), and divides the key-value heads or is a multiple of them.

## Families
`python -m benchmarks.families --json FILE --page docs/models.md` makes a tiny model of each
family (vocabulary 1003, 6 heads over 2 key-value heads of 32, 5 layers, windows of 16, random
weights with noise on every parameter) and takes two steps of GRPO with a reference and two of PPO
with a critic on it, learning rate 1e-3, float32, vLLM. The number is the largest difference of
any sampled token's log-prob between the training engine and the generation engine, over all four
steps; a row passes under 1e-5. Families marked with another engine have that one generate.
*refused* is one line before anything starts, below the table.
*not run*: this page was made without that row. Rows of several runs of the script, at several
states of the code, stand together here.
"""


def make_page(rows: Rows) -> str:
    """The page; families and cases without a row are listed as not run."""
    counted = [row for row in rows.values() if row["log_prob_gap"] is not None and row["ok"]]
    lines = [HEAD, f"Run for this page, of {len(FAMILIES)} families:", "", *summary(rows), ""]
    lines.append(f"| family | model_type | {' | '.join(CASES)} |")
    lines.append(f"|---|---|{'---|' * len(CASES)}")
    for family in FAMILIES:
        cells = [cell(rows.get((family.name, case))) for case in CASES]
        lines.append(f"| {label(family)} | `{family.model_type}` | {' | '.join(cells)} |")
    if counted:
        largest = max(row["log_prob_gap"] for row in counted)
        lines += ["", f"Largest gap of the {len(counted)} rows that ran: {largest:.1e}."]
    notes = [row for row in rows.values() if row["message"]]
    if notes:
        lines += ["", "## What is refused, and what failed", ""]
    for row in notes:
        state = "refused" if row["ok"] else "failed"
        message = " ".join(str(row["message"]).split())[:400]
        text = f"- {row['family']}, {row['case']}, {state}: {message}"
        lines += textwrap.wrap(text, 110, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def label(family: Family) -> str:
    marks = []
    if not family.packing:
        marks.append("padded")
    if family.sees_images:
        marks.append("images")
    if family.generator != "vllm":
        marks.append(f"engine {family.generator}")
    return f"{family.name} ({', '.join(marks)})" if marks else family.name


def cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "not run"
    if row["log_prob_gap"] is not None:
        gap = f"{row['log_prob_gap']:.1e}"
        return gap if row["ok"] else f"**{gap}**"
    return "refused" if row["ok"] else "**failed**"


def summary(rows: Rows) -> list[str]:
    """How many families were run in each case."""
    parts = []
    for case in CASES:
        count = sum(1 for _, run in rows if run == case)
        parts.append(f"- {case}: {count}")
    return parts
