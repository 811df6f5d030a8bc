"""Whether a mixture of experts can choose as many experts for a token as its configuration says."""

from __future__ import annotations

from transformers import PretrainedConfig

from workers.engines.model.loading import standard_sizes

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
CHOSEN_COUNTS = ("num_experts_per_tok", "top_k_experts")
"""Settings of a configuration: how many experts a layer has, and how many a token goes to."""


def check_choice(config: PretrainedConfig) -> None:
    """ValueError for a configuration by which routers can't choose experts: more of them than there
    are, groups that do not divide them. Needs no weights."""
    sizes = standard_sizes(config)
    num_experts = next(filter(None, map(sizes.get, EXPERT_COUNTS)), None)
    chosen = next((sizes[name] for name in CHOSEN_COUNTS if name in sizes), None)
    if not isinstance(num_experts, int) or not isinstance(chosen, int):
        return
    where = f"in the config.json of the model ({config.model_type})"
    if not 1 <= chosen <= num_experts:
        raise ValueError(
            f"a token goes to {chosen} of {num_experts} experts {where}; correct num_experts_per_tok"
        )
    groups, used = sizes.get("n_group") or 1, sizes.get("topk_group") or 1
    size, remainder = divmod(num_experts, groups)
    if remainder or not 1 <= used <= groups or size * used < chosen or size < min(2, groups):
        raise ValueError(
            f"n_group is {groups} and topk_group {used}, which do not suit {num_experts} experts, {chosen} "
            f"for each token, {where}; correct them"
        )
