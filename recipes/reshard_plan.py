"""Plan the actor's weights' way from training to generation without starting anything: the certificate, and
who sends what to whom.

    python -m recipes.reshard_plan source=2-4-1 target=1-2 model=llama-7b
    python -m recipes.reshard_plan source=8-8-8 target=1-8 model=llama-70b bucket_mb=256 devices_per_node=8
    python -m recipes.reshard_plan source=fsdp-8 target=1-2 model=PATH picture=plan.png

source: p-t-d as the paper writes it, fsdp-N or zero3-N; target: pg-tg (the rest is data parallel). Biases and
per-head norms, under a thousandth of the bytes, are not in the model's shape; a run prints the certificate of
its real parameters.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridflow.layout import AXES, Layout
from hybridflow.mapping.question.zoo import model_spec
from hybridflow.resharding import Plan, ShardMap, compile, verify
from hybridflow.resharding.analytic import ParameterRule, decoder_rules, fsdp, generation, threed, zero3
from hybridflow.resharding.drawing import draw_plan
from hybridflow.resharding.grouping import Grouping, fewest_bytes, vanilla, zero_redundancy
from hybridflow.resharding.paper import deepspeed_chat, hybridflow, hybridflow_v

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
    try:
        config = to_config(sys.argv[1:])
        started = time.perf_counter()
        plan, grouping = make_plan(config)
        certificate = verify(plan)
        print(certificate)
        print(f"  compiled and verified in {time.perf_counter() - started:.1f} s")
        print(comparison(config, plan))
        print(groups(grouping))
        print(busiest(plan))
        if config.picture:
            draw_plan(
                plan,
                Path(config.picture),
                f"{config.model}: training {config.source} to generation {config.target} ({config.grouping})",
            )
            print(f"picture: {config.picture}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def to_config(arguments: list[str]) -> ReshardPlanConfig:
    """key=value arguments over the defaults; a wrong key or type is a ValueError with its name."""
    try:
        config = OmegaConf.merge(OmegaConf.structured(ReshardPlanConfig), OmegaConf.from_dotlist(arguments))
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ValueError(f"not set: {', '.join(missing)}; give each as name=value")
        return cast(ReshardPlanConfig, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ValueError(
            str(error).split("\n")[0] + f"; known: {', '.join(ReshardPlanConfig.__dataclass_fields__)}"
        ) from None


def make_plan(config: ReshardPlanConfig) -> tuple[Plan, Grouping]:
    rules, (pp, tp) = model_rules(config), numbers(config.target, 2, "target", "pg-tg, say 1-2")
    source, layout = training_map(config, rules)
    if config.grouping == "vanilla":
        grouping = vanilla(source.num_ranks, tp=tp, pp=pp)
    elif config.grouping == "zero_redundancy":
        if layout is None:
            raise ValueError("grouping=zero_redundancy needs a source p-t-d; use fewest_bytes")
        grouping = zero_redundancy(layout, tp=tp, pp=pp)
    elif config.grouping == "fewest_bytes":
        grouping = fewest_bytes(
            source, generation(rules, vanilla(source.num_ranks, tp=tp, pp=pp)), tp=tp, pp=pp
        )
    else:
        raise ValueError(f"grouping={config.grouping}: known are {', '.join(GROUPINGS)}")
    nodes = [rank // config.devices_per_node for rank in range(source.num_ranks)]
    return compile(
        source, generation(rules, grouping), bucket_bytes=config.bucket_mb << 20, nodes=nodes
    ), grouping


def model_rules(config: ReshardPlanConfig) -> list[ParameterRule]:
    spec = model_spec(config.model)
    if spec.num_experts:
        raise ValueError(
            f"model={config.model}: layouts of mixture-of-experts models are not known here; run it and read "
            "its certificate"
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


def training_map(config: ReshardPlanConfig, rules: list[ParameterRule]) -> tuple[ShardMap, Layout | None]:
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


def comparison(config: ReshardPlanConfig, plan: Plan) -> str:
    """The plan beside the paper's predictions (its table 2)."""
    if config.source.startswith(("fsdp", "zero3")):
        return ""
    pp, tp, dp = numbers(config.source, 3, "source", "p-t-d")
    generation_pp, generation_tp = numbers(config.target, 2, "target", "pg-tg")
    model = plan.target.num_bytes
    rows = [
        ("DeepSpeed-Chat", deepspeed_chat(pp=pp, tp=tp, dp=dp)),
        ("HybridFlow-V", hybridflow_v(pp=pp, tp=tp)),
    ]
    if tp % generation_tp == 0 and pp % generation_pp == 0:
        rows.append(
            ("HybridFlow", hybridflow(pp=pp, tp=tp, generation_pp=generation_pp, generation_tp=generation_tp))
        )
    lines = [
        f"  {name:<15} receives {float(p.received * model) / 1e9:9.3f} GB, peak "
        f"{float(p.peak * model) / 1e9:9.3f} GB"
        for name, p in rows
    ]
    peak = max(plan.target.bytes_per_rank)
    lines.append(
        f"  {'this plan':<15} receives {max(plan.bytes_received) / 1e9:9.3f} GB, peak {peak / 1e9:9.3f} GB"
    )
    return "per rank at most, the paper's predictions first:\n" + "\n".join(lines)


def groups(grouping: Grouping) -> str:
    shown = [f"[{' '.join(map(str, group))}]" for group in grouping.tensor_groups[:16]]
    more = f" and {len(grouping.tensor_groups) - 16} more" if len(grouping.tensor_groups) > 16 else ""
    return f"generation TP groups: {' '.join(shown)}{more}"


def busiest(plan: Plan, count: int = 16) -> str:
    """Who sends how much to whom, the largest first."""
    remote = plan.remote
    totals: dict[tuple[int, int], int] = {}
    for sender, receiver, size in zip(
        plan.sender[remote].tolist(),
        plan.receiver[remote].tolist(),
        plan.num_bytes[remote].tolist(),
        strict=True,
    ):
        totals[sender, receiver] = totals.get((sender, receiver), 0) + size
    ordered = sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    lines = [
        f"  {sender:4} -> {receiver:<4} {size / 1e6:12,.1f} MB"
        for (sender, receiver), size in ordered[:count]
    ]
    more = [f"  ... and {len(ordered) - count} more pairs"] if len(ordered) > count else []
    return (
        "\n".join(["who sends to whom:", *lines, *more])
        if lines
        else "nothing is sent: every rank holds what it needs"
    )


if __name__ == "__main__":
    main()
