"""ModelSource: a Hugging Face checkpoint on every rank without every rank reading it.

Rank 0 reads the weights into host memory in float32; every other rank builds the same modules on
the meta device and receives each tensor by broadcast when its module is materialized, so that a
rank never holds more than one unsharded module. Adapters are added to the model by lora.py.
Quantized checkpoints are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_utils import get_state_dict_dtype, load_state_dict
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from hybridflow.context import RankContext
from hybridflow.progress import activity
from workers.config import ModelConfig, SavedDtype
from workers.engines.base import Head
from workers.engines.model.attention import (
    check_packable,
    check_shares_rows,
    use_sequence_attention,
)
from workers.engines.model.fit import (
    Found,
    check_files,
    check_tied,
    has_files,
    judge,
    model_directory,
    no_score_head,
)
from workers.engines.model.peft_files import is_adapter
from workers.engines.model.scored import score_head
from workers.engines.model.tensor_parts import Parts
from workers.images import family_of
from workers.images.families import FAMILIES
from workers.published import MISFITS, in_a_line, model_below, read_config
from workers.quiet import quiet
from workers.weight_files import check_weight_files, model_files

AUTO = "auto"
"""ModelConfig.attention: transformers' choice for the model; where that is PyTorch's fused kernel,
attention.py."""
UNLIMITED = 2**31 - 1
"""position_limit() of a model that has none."""
NEW_HEAD_STD = 0.02
FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json")
GGUF_FIX = (
    ", which transformers makes of this one: AutoModelForCausalLM.from_pretrained(directory, "
    "gguf_file=name).save_pretrained(...), and AutoTokenizer alike"
)
LANGUAGE_MODELS = ("ForCausalLM", "ForConditionalGeneration")
"""The ends of the names of classes without a score head."""
DTYPES = {
    SavedDtype.float32: torch.float32,
    SavedDtype.bfloat16: torch.bfloat16,
    SavedDtype.float16: torch.float16,
}


class ModelSource:
    """All ranks of the default group together:

        source = ModelSource(config, Head.lm, context)
        for layer in decoder_layers(source.model):
            source.materialize(layer, device)       # real weights, the same on all ranks
            fully_shard(layer)
        source.materialize(source.model, device)    # what is left

    A world of one holds real weights from the start, and materialize only moves them to the device.
    """

    def __init__(
        self, config: ModelConfig, head: Head, context: RankContext, seed: int = 0
    ) -> None:
        self.rank, self.world_size = context.rank, context.world_size
        self._weights: dict[str, Tensor] = {}
        loaded, error = None, None
        if self.rank == 0:
            try:
                loaded = load_pretrained(config, head, seed)
            except ValueError as problem:
                error = str(problem)
        error = self._from_rank_zero(error)
        if error is not None:
            raise ValueError(error)
        if loaded is not None and self.world_size == 1:
            self.model: PreTrainedModel = loaded
        else:
            self.model = build_on_meta(config, head)
        if loaded is not None:
            self._weights = dict(
                chain(
                    loaded.named_parameters(remove_duplicate=False),
                    loaded.named_buffers(remove_duplicate=False),
                )
            )
        use_sequence_attention(self.model, fused=config.attention != AUTO)
        self.generation_config: GenerationConfig | None = (
            loaded.generation_config if loaded is not None and head is Head.lm else None
        )
        """The checkpoint's, on rank 0."""
        self.parts: Parts = {}
        """What the parameters of `model` are of the checkpoint's, by their names in `model`; those
        that are not here are whole. Set before materialize by who splits the model."""
        self.frozen_dtype: torch.dtype | None = None
        """The data type that frozen parameters are kept in, where it is not float32. Set before
        materialize."""
        self._done: set[tuple[int, str]] = set()
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._owners: dict[int, list[tuple[nn.Module, str]]] = {}
        self._originals: list[Tensor] = []

    def materialize(self, module: nn.Module, device: torch.device) -> None:
        """Give every parameter and buffer under `module` its checkpoint value on `device`; tied
        ones stay tied. Collective.

        What has been materialized before is skipped, so modules can be sharded one after the other,
        from the leaves up. Of a parameter that was split (`parts`) this rank gets its part.
        """
        if not self._owners:
            self._find_owners()
        for owner in module.modules():
            for name, tensor in _own_tensors(owner):
                if (id(owner), name) not in self._done:
                    self._materialize(owner, name, tensor, device)

    def add_parameter(
        self, module: nn.Module, name: str, shape: tuple[int, ...], make: Callable[[], Tensor]
    ) -> None:
        """Gives a module of the model a float32 parameter that the checkpoint lacks, before
        anything is materialized; `make` is called where the weights are, on rank 0."""
        value = torch.empty(shape, device="meta")
        if self.rank == 0:
            weights = self._weights[_join(self._names[id(module)], name)] = make()
            if self.world_size == 1:
                value = weights
        module.register_parameter(name, nn.Parameter(value))

    def replace(self, name: str, value: Tensor) -> None:
        """Another value for a parameter of the checkpoint, before anything is materialized."""
        if self.rank == 0:
            with torch.no_grad():
                self._weights[name].copy_(value)

    def _materialize(
        self, owner: nn.Module, name: str, tensor: Tensor, device: torch.device
    ) -> None:
        prefix = self._names[id(owner)]
        part = self.parts.get(_join(prefix, name))
        if part is None:
            value = self._receive(_join(prefix, name), tensor.shape, tensor.dtype, device)
            self._exchange(tensor, value)
            return
        value = self._receive(part.name, part.shape, tensor.dtype, device)
        for attribute, local in list(owner.named_parameters(recurse=False)):
            other = self.parts[_join(prefix, attribute)]
            if other.name == part.name:  # all parts of a fused parameter lie in one module
                whole_is_part = other.box.shape == part.shape
                mine = other.of(value)
                self._exchange(local, mine if whole_is_part else mine.clone())

    def _receive(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The checkpoint's tensor, the same on all ranks."""
        if self.rank == 0:
            value = self._weights.pop(name).detach().to(device).contiguous()
        else:
            value = torch.empty(tuple(shape), dtype=dtype, device=device)
        if self.world_size > 1:
            dist.broadcast(value, src=0)
        return value

    def _exchange(self, tensor: Tensor, value: Tensor) -> None:
        """Put `value` in the place of a tensor, wherever it is used."""
        is_parameter = isinstance(tensor, nn.Parameter)
        if is_parameter and not tensor.requires_grad and self.frozen_dtype is not None:
            value = value.to(self.frozen_dtype)
        new = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
        for owner, name in self._owners[id(tensor)]:
            self._done.add((id(owner), name))
            if isinstance(new, nn.Parameter):
                owner._parameters[name] = new
            else:
                owner._buffers[name] = new

    def _find_owners(self) -> None:
        """Which modules hold each tensor (several do if it is tied). Not before now: the caller
        may have exchanged parameters."""
        for module in self.model.modules():
            for name, tensor in _own_tensors(module):
                self._owners.setdefault(id(tensor), []).append((module, name))
                # Alive for as long as its id is a key.
                self._originals.append(tensor)

    def _from_rank_zero(self, error: str | None) -> str | None:
        if self.world_size == 1:
            return error
        box = [error]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def load_pretrained(config: ModelConfig, head: Head, seed: int = 0) -> PreTrainedModel:
    """The model in float32 on the CPU, a new head drawn from `seed`; ValueError for a path, an
    architecture or weights that do not fit."""
    hf_config = model_config(config, head)
    check_whole_numbers(config, hf_config)
    check_weight_files(config.path, "model.path", model_directory(config))
    try:
        # What is missing, unused or of another shape is judged in fit.py.
        with activity(f"loading the weights of {config.path}"), quiet():
            model, info = _auto_class(head, hf_config).from_pretrained(
                config.path,
                config=hf_config,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=torch.float32,
                attn_implementation=_attention(config),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(
            f"model.path is {config.path!r}: its weights cannot be loaded; {error}"
        ) from error
    if judge(config, head, model, Found.of(info)):
        _initialize_score(score_head(model), seed)
    check_tied(config, model)
    return model


def build_on_meta(config: ModelConfig, head: Head) -> PreTrainedModel:
    """The same modules as load_pretrained's, without memory."""
    hf_config = model_config(config, head)
    try:
        with torch.device("meta"):
            return _auto_class(head, hf_config).from_config(
                hf_config,
                dtype=torch.float32,
                attn_implementation=_attention(config),
                trust_remote_code=config.trust_remote_code,
            )
    except ValueError as error:
        if "attn_implementation" not in str(error):
            raise
        raise ValueError(
            f"model.attention is {config.attention!r}, which transformers does not have for a "
            f"{hf_config.model_type}; use auto ({in_a_line(error)})"
        ) from error
    except MISFITS as error:
        raise ValueError(
            f"model.path is {config.path!r}: transformers can't build the model of its config.json; "
            f"{in_a_line(error)}"
        ) from error
    except ImportError as error:
        raise ValueError(
            f"model.path is {config.path!r} with model.attention={config.attention}: it needs a package "
            f"that is not installed ({' '.join(str(error).split())}); install it, or set "
            "model.attention=auto"
        ) from error


def check_whole_numbers(config: ModelConfig, published: PretrainedConfig) -> None:
    """ValueError for quantized weights, which can neither be trained nor have an adapter merged into
    them."""
    quantization = published.to_dict().get("quantization_config")
    if quantization:
        raise ValueError(
            f"model.path is {config.path!r}: its weights are quantized "
            f"({quantization.get('quant_method', 'in a way that is not named')}); use the directory or "
            "hub name of the same model in float32, bfloat16 or float16"
        )


def check_weights(config: ModelConfig, head: Head) -> None:
    """ValueError for files whose weights are not those of the model; none are loaded. Quantized ones
    are for engines that read them."""
    if not has_files(model_directory(config)):
        return
    if not model_config(config, head).to_dict().get("quantization_config"):
        check_files(config, head, build_on_meta(config, head))


def check_packing(config: ModelConfig, head: Head, cp: int = 1) -> None:
    """ValueError for a model whose attention can't keep the sequences of a packed row apart, or can't
    work on the parts of a row that `cp` ranks share."""
    model = build_on_meta(config, head)
    use_sequence_attention(model, fused=config.attention != AUTO)
    check_packable(model)
    if cp > 1:
        check_shares_rows(model, cp)


def model_config(config: ModelConfig, head: Head) -> PretrainedConfig:
    """The checkpoint's configuration; ValueError if it is not that of a causal language model."""
    if is_adapter(config.path):
        raise ValueError(
            f"model.path is {config.path!r}: the directory of an adapter; set model.path to its base "
            f"and train.lora.adapter={config.path}, or merge the two with python -m recipes.merge"
        )
    if config.path == "???":
        raise ValueError("model.path is not set; give a Hugging Face directory or a hub name")
    try:
        hf_config = read_config(config)
    except (OSError, ValueError) as error:
        if config.path.endswith(FILES):
            raise ValueError(
                f"model.path is {config.path!r}, a file; give the directory of a Hugging Face model"
                + (GGUF_FIX if config.path.endswith(".gguf") else "")
            ) from error
        if (Path(config.path) / "config.json").is_file():
            raise ValueError(
                f"model.path is {config.path!r}: transformers can't read its config.json; "
                f"{' '.join(str(error).split())}"
            ) from error
        # The hub's remarks on how names are written help nobody who gave a directory.
        missing = Path(config.path).is_absolute() and not Path(config.path).exists()
        why = "there is no such directory" if missing else " ".join(str(error).split())
        if below := model_below(config.path):
            why = f"there is one in {below}; set model.path to that"
        raise ValueError(
            f"model.path is {config.path!r}: neither a directory with a Hugging Face config.json "
            f"nor a reachable hub name; {why}"
        ) from error
    kind = hf_config.model_type
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.trust_remote_code
    known = known or family_of(hf_config) is not None
    if not known and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"model.path is {config.path!r}: {kind} sees images in a way that is not known; use a language "
            f"model, or one that sees images of {', '.join(FAMILIES)}"
        )
    bidirectional = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not hf_config.is_decoder
    if not known or bidirectional or hf_config.is_encoder_decoder:
        raise ValueError(
            f"model.path is {config.path!r}: {kind} is not a causal (decoder-only) language "
            "model; use one that is"
        )
    if head is not Head.lm:
        hf_config.num_labels = 1  # the names of a single label stay
        hf_config.problem_type = None
        add_classifier(hf_config)
    if (
        head is Head.score
        and not config.new_head
        and any(name.endswith(LANGUAGE_MODELS) for name in hf_config.architectures or ())
        and not has_files(model_directory(config))  # whose entries say more
    ):
        raise ValueError(no_score_head(config))
    return hf_config


def position_limit(model: ModelConfig, head: Head) -> int:
    """Tokens of the longest row that the model was made for; UNLIMITED where its configuration
    names none (ALiBi, state spaces)."""
    return int(
        standard_sizes(model_config(model, head)).get("max_position_embeddings") or UNLIMITED
    )


def standard_sizes(config: PretrainedConfig) -> dict[str, Any]:
    """The settings of the text model, under transformers' standard names too where its family has
    other ones (n_head is num_attention_heads). Families leave out what they do not have."""
    text = config.get_text_config()
    values = text.to_dict()
    for standard, name in text.attribute_map.items():
        if name in values:
            values.setdefault(standard, values[name])
    return values


def saved_dtype(model: ModelConfig, config: PretrainedConfig) -> torch.dtype:
    """The data type of weights that are saved: model.dtype, or that of the published `config`, or,
    where this names none, the first one in the model's files, as transformers loads them."""
    if model.dtype is not SavedDtype.auto:
        return DTYPES[model.dtype]
    published = config.dtype or config.get_text_config().dtype
    if published is None:
        files = model_files(model_directory(model))
        weights = [file for file in files if file.suffix != ".json"]
        if weights:
            published = get_state_dict_dtype(load_state_dict(weights[0], map_location="meta"))
    if published in DTYPES.values():
        return published
    return torch.float32  # float64, or a quantized kind


def _attention(config: ModelConfig) -> str | None:
    return None if config.attention == AUTO else config.attention


def add_classifier(config: PretrainedConfig) -> None:
    """Make a sequence classifier known to transformers for a family that has only a language model
    (Granite, Cohere, OLMo): its decoder with a linear head, as transformers' own are made."""
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        language_model, ending = MODEL_FOR_CAUSAL_LM_MAPPING[kind], "ForCausalLM"
    elif kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        language_model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]
        ending = "ForConditionalGeneration"
    else:
        return
    base = next(cls for cls in language_model.__mro__ if ending not in cls.__name__)
    name = language_model.__name__.replace(ending, "ForSequenceClassification")
    attributes = {
        "__module__": __name__,
        "base_model_prefix": _decoder_name(language_model, config),
        "config_class": kind,
    }
    classifier = type(name, (GenericForSequenceClassification, base), attributes)
    AutoModelForSequenceClassification.register(kind, classifier, exist_ok=True)
    names = get_checkpoint_conversion_mapping(language_model.__name__)
    if names is not None:
        register_checkpoint_conversion_mapping(name, names, overwrite=True)


def _decoder_name(language_model: type[PreTrainedModel], config: PretrainedConfig) -> str:
    """The attribute that is the decoder, which its class names wrongly in some families (Llama 4)."""
    named = language_model.base_model_prefix
    with torch.device("meta"):
        model = language_model(copy.deepcopy(config))  # it writes its choice of experts' code there
    if hasattr(model, named):
        return named
    return next(name for name, part in model.named_children() if isinstance(part, PreTrainedModel))


def _auto_class(head: Head, config: PretrainedConfig) -> Any:
    if head is not Head.lm:
        return AutoModelForSequenceClassification
    return language_model_class(config)


def language_model_class(config: PretrainedConfig) -> Any:
    """The class of transformers that loads the model: with its vision tower where it has one."""
    if family_of(config) is not None:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _initialize_score(score: nn.Linear, seed: int) -> None:
    """A new value head: the same for a seed, on every layout."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        score.weight.normal_(0.0, NEW_HEAD_STD, generator=generator)
        if score.bias is not None:
            score.bias.zero_()


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The numbers of a checkpoint that are no parameters: the bias by which DeepSeek's router chooses,
    Gemma 4's scale of a layer. Training leaves them alone; other engines need them."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                found[_join(prefix, name)] = buffer
    return found


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return list(own)
