"""Settings of the workers: the only home of their fields, defaults and docs (YAML files only
override them).

Batch sizes and token counts are global or per row, never per rank, unless the name says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Precision(StrEnum):
    """The floating-point format of weights and activations."""

    auto = "auto"
    """bf16 where the run's devices compute it natively (CUDA from compute capability 8.0 on, CPUs
    with AVX512-BF16 or AMX), fp32 elsewhere; the run says which."""
    fp32 = "fp32"
    """Weights, activations and gradients in float32."""
    bf16 = "bf16"
    """bfloat16 compute and communication of weights, float32 master weights, gradients reduced
    in float32."""


class SavedDtype(StrEnum):
    auto = "auto"
    """That of the model that the run began with."""
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class LearningRateSchedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class ContextExchange(StrEnum):
    auto = "auto"
    """ulysses where cp x tp divides the query heads, allgather elsewhere."""
    ulysses = "ulysses"
    """Heads are exchanged for tokens before and after attention."""
    allgather = "allgather"
    """Keys and values of all ranks are gathered."""
    ring = "ring"
    """Keys and values go from rank to rank, those of one at a time."""


class VisionTraining(StrEnum):
    trained = "trained"
    frozen = "frozen"
    """The vision tower and its projector stay as they were loaded; the decoder and its head are
    trained."""


@dataclass(kw_only=True)
class ModelConfig:
    """A model on disk or on the Hugging Face hub, and the tokenizer and template that go with it.

    ModelConfig(path="Qwen/Qwen2.5-0.5B-Instruct")
    """

    path: str = "???"
    """Hugging Face hub name or local directory of the model."""
    tokenizer: str | None = None
    """Hub name or directory of the tokenizer; the model's own when null."""
    revision: str | None = None
    """Branch, tag or commit of the hub's model and tokenizer; null for the newest."""
    trust_remote_code: bool = False
    """Run the code that comes with the model or its tokenizer, where transformers has none for
    it."""
    chat_template: Any = None
    """Text of a chat template (or several by name) in place of the tokenizer's, saved with the
    model; null: the tokenizer's, or what data.chat_template and data.chat_template_options make of
    it."""
    end_token_ids: list[int] | None = None
    """Tokens that end a response, saved in generation_config.json; null: all that the tokenizer,
    its chat template, generation_config.json and config.json name."""
    new_head: bool = False
    """Give a language model that has no score head a new one, as the training of a reward model
    does. Otherwise a model that is to score must have one (a critic's value head may always be
    new)."""
    dtype: SavedDtype = SavedDtype.auto
    """Data type of the weights that are saved as a Hugging Face directory. Training keeps float32
    weights whatever it is, and so do the checkpoints that a run is resumed from."""
    attention: str = "auto"
    """attn_implementation of transformers: sdpa, eager, flash_attention_2, flash_attention_3,
    flex_attention; auto takes the model's best (on a CPU, one that is fast for short rows)."""


class OnNonfinite(StrEnum):
    """The treatment of an optimizer step whose gradient norm, over all ranks, is infinite or NaN."""

    stop = "stop"
    """The run ends with an error."""
    skip = "skip"
    """The step is left out: weights, moments and the schedule stay as they are."""
    rewind = "rewind"
    """All that is trained goes back to the newest commit, and the run goes on behind the rows of
    the step that was given up."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 1e-6
    """Learning rate behind the warm-up; `schedule` lowers it from there."""
    beta1: float = 0.9
    """Decay of the mean of the gradients, each step."""
    beta2: float = 0.95
    """Decay of the mean of the squared gradients, each step."""
    epsilon: float = 1e-8
    """Added to the root of the mean squared gradient before it divides."""
    weight_decay: float = 0.0
    """Share of every weight, times the learning rate, that a step takes away (decoupled)."""
    clip_grad_norm: float = 1.0
    """Largest global L2 norm of the gradient; 0 turns clipping off."""
    schedule: LearningRateSchedule = LearningRateSchedule.constant
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    total_steps: int = 0
    """Optimizer steps after which the schedule ends; 0: those of the run."""
    min_learning_rate_fraction: float = 0.0
    """Where linear and cosine end: this share of learning_rate."""
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """stop, skip or rewind, where the gradient norm is infinite or NaN. The rows are saved in any
    case (docs/reliability.md)."""
    max_nonfinite: int = 3
    """Optimizer steps in a row that on_nonfinite=skip or rewind leaves out; one more ends the
    run."""


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA, Hu et al. 2021) on the linear layers of a frozen model: the output
    of a layer of weight W becomes x W' + scale * x A' B'.

    LoraConfig(rank=16, target_modules=["q_proj", "v_proj"])
    """

    rank: int = 0
    """Rows of A and columns of B; 0 trains the whole model."""
    alpha: float = 32.0
    """The scale is alpha / rank."""
    rslora: bool = False
    """The scale is alpha / sqrt(rank)."""
    target_modules: Any = "all-linear"
    """The layers that are adapted: all-linear (every linear layer but the output embedding), a
    list of the ends of names ([q_proj, v_proj]), or a regular expression that whole names match,
    such as '.*layers\\.[01]\\..*_proj'. Of a vision tower those that an expression matches."""
    adapter: str | None = None
    """A PEFT directory to begin with, which decides rank, alpha, rslora and target_modules."""

    @property
    def enabled(self) -> bool:
        return self.rank > 0 or self.adapter is not None


@dataclass(kw_only=True)
class TrainConfig:
    """A role's training engine: layout, precision, micro-batches and optimizer, for forward passes
    alone too.

    TrainConfig(engine="threed", pp=2, tp=2)
    """

    engine: str = "fsdp"
    """fsdp, threed or deepspeed, or an engine of another package: a name that it declares, or
    package.module:Name."""
    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline-parallel size (engine threed)."""
    cp: int = 1
    """Context-parallel size: the ranks that share the tokens of each packed row, for
    rows too long for one device. The data-parallel size is divided by it; results stay the same."""
    cp_exchange: ContextExchange = ContextExchange.auto
    """How attention sees the tokens of other context-parallel ranks."""
    cp_by_length: bool = False
    """Engine fsdp: each micro-batch is shared by as few of the cp ranks as hold its rows within
    micro_batch_tokens each, so that short rows cost no exchange. Changes speed and memory, never
    results."""
    ep: int = 1
    """Expert-parallel size: each layer's experts are divided over ep ranks, which tokens travel to.
    The group is folded over tensor, context and data ranks of a stage, whose numbers stay what they
    are; it is a multiple of tp. Results stay the same."""
    rank_order: list[str] = field(default_factory=lambda: ["dp", "pp", "cp", "tp"])
    """Axes from outermost to innermost; the data-parallel size is what the pool leaves."""
    precision: Precision = Precision.auto
    micro_batch_tokens: int = 0
    """Most tokens (padding included) that one forward pass of one data-parallel rank holds; with
    cp, of each rank that shares the row, which then has cp times as many. Changes speed and
    memory, never results. 0 chooses: 8192 on an accelerator; on a CPU as many as keep about 512
    MiB for the backward pass, 256 to 2048."""
    packing: bool = True
    """Rows of a micro-batch one after the other without padding, each attending to itself only.
    false: padded blocks of rows of similar length, for models with layers that look along the
    row by other means than attention (convolutions, state spaces), and for attention=eager or
    flex_attention. Changes speed and memory, never results."""
    share_prompts: bool = True
    """With packing: rows of a micro-batch that begin with the same prompt (the samples of a
    group, the two answers of a pair) share its tokens, which are computed once; each response
    goes on after them. Changes speed and memory, never results. Off by itself where the
    attention can't do it (flash_attention_2) or positions depend on the length of the row
    (dynamic rotary embeddings)."""
    activation_checkpointing: bool = False
    """Compute each decoder layer again in the backward pass, and keep its input only."""
    selective_checkpointing: bool = False
    """With activation_checkpointing: keep the outputs of matrix products and of attention too, so
    that only the cheap rest is computed again."""
    offload_activations: bool = False
    """Move what the backward pass needs of the decoder layers to page-locked host memory and back,
    while the next layers compute. On a CPU it only copies."""
    compile: bool = False
    """Run each decoder layer through torch.compile. The first passes compile, for seconds on a GPU
    and minutes on a CPU; results stay the same to rounding."""
    reshard_after_forward: bool = False
    """fsdp: free gathered weights after the forward pass (ZeRO-3) instead of keeping them to
    the backward pass (ZeRO-2)."""
    fsdp_replicas: int = 1
    """fsdp: weights are cut over the ranks that each of so many replicas has (HSDP), neighbours by
    rank, so that a replica can be a node: gathers and reductions stay within it, and only the sums of
    gradient shards cross. Every rank then holds as many times more of weights and optimizer."""
    pipeline_schedule: str = "1f1b"
    """threed: 1f1b or interleaved_1f1b."""
    virtual_stages: int = 1
    """threed: stages per pipeline rank for interleaved_1f1b."""
    zero_stage: int = 2
    """deepspeed: 1, 2 or 3."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory while they are not used."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train low-rank adapters in place of the model's weights."""
    vision: VisionTraining = VisionTraining.trained
    """trained or frozen: the vision tower of a model that sees images, with the projector (Qwen's
    merger) that brings its features to the decoder's width."""
    router_aux_loss_coefficient: float = 0.0
    """Factor of the auxiliary loss that spreads tokens evenly over the experts of a mixture:
    experts * sum_i f_i P_i of every layer, with the share f of the choices and the mean probability P
    of the whole mini-batch over all ranks. 0 leaves it out; over 0, each step begins with one more
    forward pass, which counts f."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
