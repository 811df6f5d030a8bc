"""vLLM inside the host process: scheduler, paged key/value cache, tensor and pipeline parallel over
the pool's own world.

No process is started: every rank builds its own engine, and the ranks of one replica take the same
decisions because they see the same requests. The engine works with the groups that exist (built
beforehand, for another grouping) or lets vLLM build its own of consecutive ranks. Speculative
decoding is left out. docs/generation.md has the measurements
behind the settings.
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PretrainedConfig

from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.progress import activity
from hybridflow.resharding import ParameterSpec
from workers.config import LoraConfig, ModelConfig
from workers.engines.model.loading import standard_sizes
from workers.engines.model.routers import REPLAYS, check_declared, experts_per_token
from workers.generation.base import GenerationEngine
from workers.generation.config import GenerationConfig, InFlight, SamplingConfig
from workers.generation.draws import Draws
from workers.generation.rows import FinishedRow, NewRow
from workers.generation.sampling import (
    end_token_ids,
    load_model_config,
    stop_token_ids,
)
from workers.generation.vllm.adapter import VllmAdapter, has_slot, take_slot
from workers.generation.vllm.build import check_build
from workers.generation.vllm.destination import VllmShards
from workers.generation.vllm.groups import build_vllm_groups
from workers.generation.vllm.images import VllmImages, check_library
from workers.generation.vllm.limits import check_fits, check_known, check_meta
from workers.generation.vllm.memory import (
    CpuMemory,
    CudaMemory,
    EngineMemory,
    model_runner,
    reload_weights,
)
from workers.generation.vllm.own_classes import own_classes
from workers.generation.vllm.routes import RouteTable
from workers.generation.vllm.setup import (
    build_llm,
    computes_eagerly,
    named_refusal,
    preserve_process_state,
    sums_through_peers,
    vllm_environment,
)
from workers.generation.weight_destination import WeightDestination
from workers.images import family_of
from workers.images.families import published_config
from workers.precision import with_native_precision

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.inputs.engine import EngineInput


class VllmEngine(GenerationEngine):
    """See GenerationEngine; one object per rank.

    engine = VllmEngine(model=ModelConfig(path=...), config=GenerationConfig(tp=2), context=context,
    load_weights=False)
    """

    library: ClassVar[str] = "vllm"
    shares_process: ClassVar[bool] = True
    records: ClassVar[bool] = True
    sees_images: ClassVar[bool] = True
    llm: LLM
    """vLLM's own object, for what replaces the weights by other means."""
    has_graphs: bool
    """It computes with CUDA graphs, which hold the addresses of the weights."""

    @classmethod
    def check_device(cls, device: str) -> None:
        check_build(device)

    @classmethod
    def check_model(cls, model: PretrainedConfig, config: GenerationConfig) -> None:
        check_known(model)
        check_fits(model, config)
        if family_of(model) is not None:
            check_library(model.model_type)

    @classmethod
    def takes_adapter(
        cls, model: PretrainedConfig, config: GenerationConfig, lora: LoraConfig
    ) -> bool:
        return config.pp == 1 and has_slot(model, lora)

    @classmethod
    def check_sync(cls, model: PretrainedConfig) -> None:
        check_meta(model)

    def __init__(
        self,
        *,
        model: ModelConfig,
        config: GenerationConfig,
        context: RankContext,
        load_weights: bool = True,
        layout: Layout | None = None,
        lora: LoraConfig | None = None,
    ) -> None:
        """Build the engine; collective over the pool.

        load_weights=False leaves the weights random, for an actor that pushes its own before the
        first generation. `lora`: with a slot for such an adapter, which an actor pushes.
        """
        check_build(context.device)
        if context.world_size % (config.tp * config.pp):
            raise ValueError(
                f"generation.tp={config.tp}, pp={config.pp}: tp * pp must divide the pool's "
                f"{context.world_size} devices"
            )
        self.layout = layout or Layout.of(
            dp=context.world_size // (config.pp * config.tp), pp=config.pp, tp=config.tp
        )
        self.weight_version = -1
        config = with_native_precision(config, context.device)
        text_config = load_model_config(model)
        self._end_tokens = end_token_ids(model, text_config)
        self._vocab_size = text_config.vocab_size
        published = published_config(model)
        sees_images = family_of(published) is not None
        # With images the head is the whole model's, not the decoder's.
        whole = published.to_dict() if sees_images else standard_sizes(text_config)
        self._tied = bool(whole.get("tie_word_embeddings"))
        self._images = VllmImages(model) if sees_images else None
        self._has_tokenizer = bool(config.sampling.stop_strings)
        self._has_weights = True
        self._text_config = text_config
        self._routes: RouteTable | None = None
        self._build(model, config, context, load_weights=load_weights, replicas=layout, lora=lora)
        self._max_model_len = self.llm.model_config.max_model_len
        self._keys = itertools.count()
        self._requests: dict[int, str] = {}
        """vLLM's own names of the rows that are unfinished."""
        self._finished = {}
        self._prompt_log_probs: dict[int, NDArray[np.float32]] = {}
        self._salt = 0
        self._slot = take_slot(model_runner(self.llm)) if lora is not None else None
        self._memory: EngineMemory = (
            CudaMemory(self.llm) if context.device.startswith("cuda") else CpuMemory(self.llm)
        )
        cuda = context.device.startswith("cuda")
        self.has_graphs = cuda and not computes_eagerly(config, cuda=cuda)
        self._check_groups(context.rank)
        prepare_pipeline(self.llm)
        run_one_batch_at_a_time(self.llm)

    def _build(
        self,
        model: ModelConfig,
        config: GenerationConfig,
        context: RankContext,
        *,
        load_weights: bool,
        replicas: Layout | None,
        lora: LoraConfig | None,
    ) -> None:
        """vLLM with the trainer's sampler. `replicas`: the layout whose replicas are made groups; None
        leaves groups to vLLM."""
        fast_sum = sums_through_peers(context, config)
        environment = vllm_environment(context, config, fast_sum=fast_sum)
        with activity("building vLLM"), preserve_process_state(context, environment):
            from vllm.distributed.parallel_state import model_parallel_is_initialized

            from workers.generation.vllm.sampler import TrainerSampler

            self._owns_groups = not model_parallel_is_initialized()
            if replicas is not None and self._owns_groups:
                build_vllm_groups(replicas_of(replicas), fast_sum=fast_sum)
            built: list[nn.Module] = []
            with own_classes(built), named_refusal(self._text_config.model_type):
                self.llm = build_llm(
                    model,
                    config,
                    self._text_config,
                    load_weights=load_weights,
                    cuda=context.device.startswith("cuda"),
                    fast_sum=fast_sum,
                    lora=lora,
                    sees_images=self._images is not None,
                )
                built.append(model_runner(self.llm).get_model())
            # vLLM's own finalizer would destroy torch.distributed's world, which is the pool's.
            self.llm.llm_engine.engine_core._finalizer.detach()
            self._sampler = TrainerSampler(model_runner(self.llm))
            model_runner(self.llm).sampler = self._sampler

    def record_routes(self) -> tuple[int, int]:
        check_declared(self._text_config, REPLAYS)
        if self.layout.axis_size("pp") > 1:
            raise ValueError(
                "actor.router_replay is R3 with actor.generation.pp over 1, where each rank sees the "
                "routes of its own layers; set pp=1, or use R2"
            )
        if self.has_graphs:
            raise ValueError(
                "actor.router_replay is R3, but CUDA graphs hold what was there when they were "
                "captured; set actor.generation.enforce_eager=true, or use R2"
            )
        self._routes = RouteTable(model_runner(self.llm), experts_per_token(self._text_config))
        return self._routes.shape

    def _add(self, rows: Sequence[NewRow], sampling: SamplingConfig) -> list[int]:
        if sampling.stop_strings and not self._has_tokenizer:
            raise ValueError(
                f"sampling.stop_strings={sampling.stop_strings}: the engine was built without a "
                "tokenizer; set them in actor.generation.sampling.stop_strings, so that it loads "
                "one"
            )
        common = self._sampling_params(sampling)
        keys = []
        for row in rows:
            params = copy.copy(common)
            params.max_tokens = row.most_tokens
            draws = Draws(row.seed, row.position, sampling)
            keys.append(self._request(self._input(row), params, draws))
        return keys

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def step(self) -> list[int]:
        if not self._has_weights:
            raise RuntimeError(
                "generation: sleep freed the weights; wake the engine and give it weights first"
            )
        self._memory.take_back_cache()
        ended = []
        for output in self.llm.llm_engine.step():
            key = int(output.request_id)
            self._finished[key] = self._take(key, output)
            ended.append(key)
        return ended

    def preempt(self) -> None:
        if not self.llm.llm_engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError(
                "generation: vLLM did not forget its cached prefixes although nothing runs"
            )

    def cancel(self, keys: Iterable[int]) -> None:
        requests = []
        for key in keys:
            self._finished.pop(key, None)
            if key in self._requests:
                requests.append(self._requests.pop(key))
        self.llm.llm_engine.abort_request(requests, internal=True)
        for request in requests:
            self._sampler.drop(request)

    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if not 2 <= len(token_ids) < self._max_model_len:
            raise ValueError(
                f"score: {len(token_ids)} tokens; pass at least 2 and fewer than "
                f"max_model_len={self._max_model_len}"
            )
        ids = list(token_ids)
        if self.layout.axis_size("pp") > 1:
            return self._score_prefixes(ids)
        # Half of them are generated, by force: decoding runs other code than reading a prompt (other
        # kernels, CUDA graphs, matrices derived from the weights).
        half = -(-len(ids) // 2)
        params = SamplingParams(
            max_tokens=len(ids) - half,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        key = self._request(self._tokens(ids[:half]), params, Draws(forced=ids[half:]))
        (decoded,) = self._run_to_end([key])
        return np.concatenate([self._prompt_log_probs.pop(key), decoded.log_probs])

    def _score_prefixes(self, ids: list[int]) -> NDArray[np.float32]:
        """score by one forced token after every prefix: with pipeline stages vLLM has no
        log-probs of prompts."""
        params = self._sampling_params(SamplingConfig(max_response_tokens=1))
        keys = []
        for length in range(1, len(ids)):
            forced = Draws(forced=ids[length : length + 1])
            keys.append(self._request(self._tokens(ids[:length]), copy.copy(params), forced))
        return np.concatenate([row.log_probs for row in self._run_to_end(keys)])

    def weight_destination(
        self,
        parameters: Sequence[ParameterSpec],
        dtype: torch.dtype,
        device: str,
        in_flight: InFlight = InFlight.recompute,
    ) -> WeightDestination:
        """vLLM's own memory has dtype and device already."""
        del dtype, device
        if self._slot is not None:
            return VllmAdapter(self, model_runner(self.llm), parameters, in_flight)
        return VllmShards(self, parameters, in_flight)

    def load_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        version: int,
        in_flight: InFlight = InFlight.recompute,
    ) -> None:
        reload_weights(self.llm, weights, tied=self._tied)
        self.weights_written(version, in_flight)

    def weights_written(self, version: int, in_flight: InFlight = InFlight.recompute) -> None:
        if in_flight is InFlight.drain:
            self.check_drained()
        if in_flight is InFlight.keep:
            self._part_prefixes()
        else:
            self.preempt()
        if self._images is not None:
            self.llm.llm_engine.reset_encoder_cache()  # images that the old tower saw
        self._has_weights = True
        self.weight_version = self._sampler.weight_version = version

    def _part_prefixes(self) -> None:
        """Share no keys and values between prefixes read before and from now on: vLLM looks them up
        by their tokens and a salt, and cannot forget those that running rows use."""
        self._salt += 1
        for request in self.llm.llm_engine.engine_core.engine_core.scheduler.waiting:
            request.cache_salt = str(self._salt)
            request.block_hashes.clear()
            request.update_block_hashes()

    def sleep(self) -> int:
        self.preempt()
        freed = self._memory.release()
        self._has_weights = False
        self.weight_version = -1
        return freed

    def wake(self) -> None:
        self._memory.take_back_weights()

    def close(self) -> None:
        from vllm.distributed.parallel_state import destroy_model_parallel

        core = self.llm.llm_engine.engine_core.engine_core
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        del self.llm, self._sampler, self._memory, core
        gc.unfreeze()
        gc.collect()
        if self._owns_groups:
            destroy_model_parallel()

    def _check_groups(self, rank: int) -> None:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        for axis, group in (("tp", get_tp_group()), ("pp", get_pp_group())):
            expected = list(self.layout.group(rank, axis))
            assert group.ranks == expected, (
                f"vLLM's {axis} group is {group.ranks}, the layout's {expected}: build the groups "
                "of the layout"
            )

    def _sampling_params(self, sampling: SamplingConfig) -> SamplingParams:
        """vLLM only counts and stops, drawing is TrainerSampler's."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0.0,
            max_tokens=sampling.max_response_tokens,
            stop=sampling.stop_strings,
            stop_token_ids=stop_token_ids(sampling, self._end_tokens),
            ignore_eos=True,  # the end-of-sequence tokens are among stop_token_ids
            detokenize=bool(sampling.stop_strings),
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )

    def _tokens(self, prompt: list[int]) -> EngineInput:
        """A prompt of text."""
        from vllm.inputs.engine import tokens_input

        return tokens_input(prompt, cache_salt=str(self._salt))

    def _input(self, row: NewRow) -> EngineInput:
        if not row.images:
            return self._tokens(row.prompt.tolist())
        if self._images is None:
            raise ValueError(
                f"generation: a prompt has {len(row.images)} images, and {self._text_config.model_type} "
                "sees none"
            )
        return self._images.input(row, str(self._salt))

    def _request(self, prompt: EngineInput, params: SamplingParams, draws: Draws) -> int:
        """A request of vLLM's; returns its key."""
        key = next(self._keys)
        # The arrival decides nothing with vLLM's first-come queue. The clock would differ between
        # the ranks of a replica.
        self._requests[key] = self.llm.llm_engine.add_request(
            str(key),
            prompt,
            params,
            arrival_time=float(key),
            lora_request=self._slot,
        )
        self._sampler.add(self._requests[key], draws)
        return key

    def _take(self, key: int, output: RequestOutput) -> FinishedRow:
        """The row of a request that has finished, which is forgotten."""
        (completion,) = output.outputs
        if output.prompt_logprobs is not None:
            read = np.array(output.prompt_logprobs.logprobs, dtype=np.float32)
            self._prompt_log_probs[key] = read
        ids = np.array(completion.token_ids, dtype=np.int64)
        routes = None
        if self._routes is not None:
            routes = self._routes.take(self._requests[key], len(ids))
        log_probs, versions = self._sampler.take(self._requests.pop(key), len(ids))
        return FinishedRow(
            token_ids=ids,
            log_probs=log_probs,
            finish_reason=str(completion.finish_reason),
            weight_versions=versions,
            routes=routes,
        )


def prepare_pipeline(llm: LLM) -> None:
    """Give later pipeline stages the buffers that they receive into: vLLM allocates them in a
    warm-up that CPUs skip."""
    from vllm.distributed.parallel_state import get_pp_group

    runner = model_runner(llm)
    if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
        )


def run_one_batch_at_a_time(llm: LLM) -> None:
    """Finish every step of an engine before the next: with pipeline stages vLLM queues batches, of
    which tokens are drawn and not yet taken in when weights are replaced. Stages in processes of
    their own gain nothing by the queue: each waits for the last one's logits."""
    core = llm.llm_engine.engine_core.engine_core
    core.batch_queue, core.step_fn = None, core.step


def replicas_of(layout: Layout) -> list[list[list[int]]]:
    """replicas[replica][stage][tensor part] = rank."""
    replicas = []
    for replica in range(layout.axis_size("dp")):
        stages = []
        for stage in range(layout.axis_size("pp")):
            parts = range(layout.axis_size("tp"))
            stages.append([layout.rank(dp=replica, pp=stage, tp=part) for part in parts])
        replicas.append(stages)
    return replicas
