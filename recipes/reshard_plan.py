"""Plan the actor's weights' way from training to generation without starting anything: the
certificate, and who sends what to whom.

    python -m recipes.reshard_plan source=2-4-1 target=1-2 model=llama-7b
    python -m recipes.reshard_plan source=8-8-8 target=1-8 model=llama-70b bucket_mb=256 devices_per_node=8
    python -m recipes.reshard_plan source=fsdp-8 target=1-2 model=PATH picture=plan.png

source: p-t-d as the paper writes it, fsdp-N or zero3-N; target: pg-tg (the rest is data parallel).
Biases and per-head norms, under a thousandth of the bytes, are not in the model's shape; a run
prints the certificate of its real parameters.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hybridflow.layout import AXES, Layout
from hybridflow.mapping.question.zoo import model_spec
from hybridflow.resharding import ReshardingPlan, ShardMap, compile, verify
from hybridflow.resharding.analytic import (
    ParameterRule,
    decoder_rules,
    fsdp,
    generation,
    threed,
    zero3,
)
from hybridflow.resharding.drawing import draw_plan
from hybridflow.resharding.grouping import Grouping, fewest_bytes, vanilla, zero_redundancy
from hybridflow.resharding.paper import deepspeed_chat, hybridflow, hybridflow_v
from hybridflow.resharding.shard_map import DTYPES
from recipes.arguments import HELP, read_arguments, usage
from recipes.errors import plain_errors

GROUPINGS = ("fewest_bytes", "zero_redundancy", "vanilla")


@dataclass(kw_only=True)
class ReshardPlanConfig:
    """Every setting of `python -m recipes.reshard_plan`."""

    source: str = "???"
    """Training layout: p-t-d, fsdp-N or zero3-N."""
    target: str = "???"
    """Generation sizes pg-tg."""
    model: str = "???"
    """A known shape (llama-7b, llama-70b, qwen2.5-7b, ...) or a Hugging Face directory."""
    grouping: str = "fewest_bytes"
    """fewest_bytes, zero_redundancy (the paper's) or vanilla (HybridFlow-V's)."""
    rank_order: str = ",".join(AXES)
    """Training axes from outermost to innermost."""
    dtype: str = "bfloat16"
    bucket_mb: int = 64
    devices_per_node: int = 8
    picture: str = ""
    """Where to draw who sends what to whom (.png, .svg, .pdf; up to 32 ranks)."""


def main() -> None:
    if {*HELP} & {*sys.argv[1:]}:
        print(usage(__doc__, ReshardPlanConfig, "recipes/reshard_plan.py"))
        return
    with plain_errors():
        report(to_config(sys.argv[1:]))


def report(config: ReshardPlanConfig) -> None:
    """Prints the plan's certificate and its senders, and draws it."""
    started = time.perf_counter()
    plan, grouping = make_plan(config)
    print(verify(plan))
    print(f"  compiled and verified in {time.perf_counter() - started:.1f} s")
    print(comparison(config, plan))
    print(groups(grouping))
    print(busiest(plan))
    if config.picture:
        title = (
            f"{config.model}: training {config.source} to generation {config.target} "
            f"({config.grouping})"
        )
        draw_plan(plan, Path(config.picture), title)
        print(f"picture: {config.picture}")


def to_config(arguments: list[str]) -> ReshardPlanConfig:
    """name=value arguments over the defaults; a mistake is a ValueError with the setting's name."""
    config = read_arguments(ReshardPlanConfig, arguments, paths=["model", "picture"])
    for name, value in {
        "bucket_mb": config.bucket_mb,
        "devices_per_node": config.devices_per_node,
    }.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; use at least 1")
    if config.grouping not in GROUPINGS:
        raise ValueError(f"grouping is {config.grouping!r}; known: {', '.join(GROUPINGS)}")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype is {config.dtype!r}; known: {', '.join(DTYPES)}")
    if sorted(config.rank_order.split(",")) != sorted(AXES):
        raise ValueError(
            f"rank_order is {config.rank_order!r}; it must name each of {', '.join(AXES)} once, "
            "with commas"
        )
    return config


def make_plan(config: ReshardPlanConfig) -> tuple[ReshardingPlan, Grouping]:
    """The compiled plan, and which ranks generate together."""
    rules = model_rules(config)
    pp, tp = numbers(config.target, 2, "target", "pg-tg, say 1-2")
    source, layout = training_map(config, rules)
    if config.grouping == "vanilla":
        grouping = vanilla(source.num_ranks, tp=tp, pp=pp)
    elif config.grouping == "fewest_bytes":
        shards = generation(rules, vanilla(source.num_ranks, tp=tp, pp=pp))
        grouping = fewest_bytes(source, shards, tp=tp, pp=pp)
    elif layout is None:
        raise ValueError("grouping=zero_redundancy needs a source p-t-d; use fewest_bytes")
    else:
        grouping = zero_redundancy(layout, tp=tp, pp=pp)
    nodes = [rank // config.devices_per_node for rank in range(source.num_ranks)]
    target = generation(rules, grouping)
    return compile(source, target, bucket_bytes=config.bucket_mb << 20, nodes=nodes), grouping


def model_rules(config: ReshardPlanConfig) -> list[ParameterRule]:
    spec = model_spec(config.model)
    if spec.num_experts:
        raise ValueError(
            f"model={config.model}: layouts of mixture-of-experts models are not known here; run "
            "it and read its certificate"
        )
    return decoder_rules(
        num_layers=spec.num_layers,
        hidden=spec.hidden_size,
        intermediate=spec.intermediate_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocab=spec.vocab_size,
        tied=spec.tied_embeddings,
        dtype=config.dtype,
    )


def training_map(
    config: ReshardPlanConfig, rules: list[ParameterRule]
) -> tuple[ShardMap, Layout | None]:
    kind, _, size = config.source.partition("-")
    if kind in ("fsdp", "zero3"):
        (num_ranks,) = numbers(size, 1, "source", "fsdp-8")
        return (fsdp if kind == "fsdp" else zero3)(rules, num_ranks), None
    pp, tp, dp = numbers(config.source, 3, "source", "p-t-d (1-4-2), fsdp-8 or zero3-8")
    layout = Layout.of(order=tuple(config.rank_order.split(",")), pp=pp, tp=tp, dp=dp)
    return threed(rules, layout), layout


def numbers(text: str, count: int, name: str, form: str) -> list[int]:
    parts = text.split("-")
    if len(parts) != count or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"{name}={text}: give it as {form}")
    return [int(part) for part in parts]


def comparison(config: ReshardPlanConfig, plan: ReshardingPlan) -> str:
    """The plan beside the paper's predictions (its table 2)."""
    if config.source.startswith(("fsdp", "zero3")):
        return ""
    pp, tp, dp = numbers(config.source, 3, "source", "p-t-d")
    generation_pp, generation_tp = numbers(config.target, 2, "target", "pg-tg")
    size = plan.target.num_bytes
    predictions = {
        "DeepSpeed-Chat": deepspeed_chat(pp=pp, tp=tp, dp=dp),
        "HybridFlow-V": hybridflow_v(pp=pp, tp=tp),
    }
    if tp % generation_tp == 0 and pp % generation_pp == 0:
        predictions["HybridFlow"] = hybridflow(
            pp=pp, tp=tp, generation_pp=generation_pp, generation_tp=generation_tp
        )
    lines = ["per rank at most, the paper's predictions first:"]
    for name, predicted in predictions.items():
        lines.append(
            _received(name, float(predicted.received * size), float(predicted.peak * size))
        )
    lines.append(_received("this plan", max(plan.bytes_received), max(plan.target.bytes_per_rank)))
    return "\n".join(lines)


def _received(name: str, received_bytes: float, peak_bytes: float) -> str:
    return f"  {name:<15} receives {received_bytes / 1e9:9.3f} GB, peak {peak_bytes / 1e9:9.3f} GB"


def groups(grouping: Grouping) -> str:
    """The ranks that share a generation replica's tensor-parallel group."""
    shown = [f"[{' '.join(map(str, group))}]" for group in grouping.tensor_groups[:16]]
    if len(grouping.tensor_groups) > len(shown):
        shown.append(f"and {len(grouping.tensor_groups) - len(shown)} more")
    return f"generation TP groups: {' '.join(shown)}"


def busiest(plan: ReshardingPlan, count: int = 16) -> str:
    """The pairs of ranks that send most, largest first."""
    remote = plan.remote
    totals: dict[tuple[int, int], int] = {}
    for sender, receiver, size in zip(
        plan.sender[remote].tolist(),
        plan.receiver[remote].tolist(),
        plan.num_bytes[remote].tolist(),
        strict=True,
    ):
        totals[sender, receiver] = totals.get((sender, receiver), 0) + size
    if not totals:
        return "nothing is sent: every rank holds what it needs"
    ordered = sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    lines = ["who sends to whom:"]
    for (sender, receiver), size in ordered[:count]:
        lines.append(f"  {sender:4} -> {receiver:<4} {size / 1e6:12,.1f} MB")
    if len(ordered) > count:
        lines.append(f"  ... and {len(ordered) - count} more pairs")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
