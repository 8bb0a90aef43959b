"""What packscore reads of the insides of torch and transformers: named here, and nowhere else.

Such names come and go with versions, so each is asked for itself, never by a version's number:
when a model is patched, or when programs are made. What is not there is an error by its name. What
is read of jax and torchax is in `packscore.programs.interfaces`.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from packscore.errors import UnsupportedVersionError
from packscore.installed import remedy, tested, version_of


@dataclass(frozen=True)
class Interface:
    """One inner name of another package.

    Args:
      path: "module:attribute.attribute"; what ends in "()" is called.
      use: what it is for.
      when: it has to be there: when a model is patched or a scorer made, when programs are made,
        for a pipeline, or to load a checkpoint.
      family: of models that need it; None: all.
      mark: a name that the function at `path` reads or writes; no object shows it otherwise.
    """

    path: str
    use: str
    when: Literal["patch", "programs", "pipeline", "loading"] = "patch"
    family: str | None = None
    mark: str = ""
    name: str = field(init=False)  # the last one: of an attribute, say, to be read elsewhere

    def __post_init__(self) -> None:
        name = self.mark or self.path.replace(":", ".").rpartition(".")[2]
        object.__setattr__(self, "name", name)

    def __call__(self) -> Any:
        """The thing itself.

        Raises:
          UnsupportedVersionError: it is not there.
        """
        module, _, attributes = self.path.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for name in attributes.split("."):
                found = getattr(found, name.removesuffix("()"))
                found = found() if name.endswith("()") else found
            if self.mark and not _mentions(found, self.mark):
                raise AttributeError(self.mark)
        except (ImportError, AttributeError) as error:
            missing = self.path.replace(":", ".") + (f" with {self.mark}" if self.mark else "")
            raise _missing(module.partition(".")[0], missing, self.use) from error
        return found


def _missing(package: str, name: str, use: str) -> UnsupportedVersionError:
    return UnsupportedVersionError(
        f"{package} {version_of(package)} has no {name}, which packscore needs for {use}; "
        f"{tested(package)}; {remedy(package)}",
        package,
        name,
    )


def _mentions(function: Any, name: str) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and name in (*code.co_names, *code.co_consts, *code.co_varnames)


def absent(table: Iterable[Interface]) -> list[UnsupportedVersionError]:
    """An error for each that is not there."""
    found = []
    for one in table:
        try:
            one()
        except UnsupportedVersionError as error:
            found.append(error)
    return found


def check(table: Iterable[Interface]) -> None:
    """Ask for each.

    Raises:
      UnsupportedVersionError: the first that is not there.
    """
    for one in table:
        one()


# torch: modules as dictionaries
PARAMETERS = Interface("torch.nn:Module()._parameters", "seeing whether weights changed")
BUFFERS = Interface("torch.nn:Module()._buffers", "seeing whether buffers changed")
MODULES = Interface("torch.nn:Module()._modules", "walking a model at every request")
FORWARD_HOOKS = Interface("torch.nn:Module()._forward_hooks", "seeing hooks")
FORWARD_PRE_HOOKS = Interface("torch.nn:Module()._forward_pre_hooks", "seeing hooks")
_GLOBAL_HOOKS = "torch.nn.modules.module:_global_forward_hooks"
GLOBAL_FORWARD_HOOKS = Interface(_GLOBAL_HOOKS, "seeing hooks of all modules")
_GLOBAL_PRE_HOOKS = "torch.nn.modules.module:_global_forward_pre_hooks"
GLOBAL_FORWARD_PRE_HOOKS = Interface(_GLOBAL_PRE_HOOKS, "seeing hooks of all modules")
DROPOUT = Interface("torch.nn.modules.dropout:_DropoutNd", "refusing dropout that is at work")
COMPILED_CALL = Interface("torch.nn:Module._compiled_call_impl", "seeing model.compile()")
# torch: changes in place
TENSOR_VERSION = Interface("torch:Tensor._version", "seeing weights that change in place")
OPTIMIZER_STEPS = Interface(
    "torch.optim.optimizer:register_optimizer_step_post_hook", "seeing steps of fused optimizers"
)
# torch: kernels and devices
FUSED_ATTENTION = Interface(
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "attention with its log-sum-exp on the CPU",
)
BACKEND_NAME = Interface("torch:_C._get_privateuse1_backend_name", "telling TorchTPU from torchax")
# torch: modes that torchax sets for the whole process
FUNCTION_MODES = Interface(
    "torch:_C._len_torch_function_stack", "building a skeleton in torch alone", "programs"
)
POP_FUNCTION_MODE = Interface(
    "torch.overrides:_pop_mode_temporarily", "building a skeleton in torch alone", "programs"
)
NO_DISPATCH_MODES = Interface(
    "torch.utils._python_dispatch:_disable_current_modes",
    "building a skeleton in torch alone",
    "programs",
)

# transformers: attention
ATTENTION_REGISTRY = Interface(
    "transformers:AttentionInterface.register", "the attention of patched layers"
)
ATTENTION_FUNCTIONS = Interface(
    "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS",
    "the attention of calls that are not packed",
)
ATTENTION_NAME = Interface(
    "transformers:PreTrainedConfig._attn_implementation", "the name of a model's attention"
)
ATTENTION_NAME_KEPT = Interface(
    "transformers:PreTrainedConfig._attn_implementation.fget",
    "setting the name of a model's attention",
    mark="_attn_implementation_internal",
)
# Families by the folder of their code; "eager" is no registered function, each has its own.
FAMILIES = ("gemma2", "gemma3", "gpt_oss", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
EAGER_ATTENTION = tuple(
    Interface(
        f"transformers.models.{name}.modeling_{name}:eager_attention_forward",
        f"the eager attention of {name}",
        family=name,
    )
    for name in FAMILIES
)
# The last layer on the rows that are read: its rotation, and its attention's look into the cache.
ROTARY = tuple(
    Interface(
        f"transformers.models.{name}.modeling_{name}:apply_rotary_pos_emb",
        f"the keys of {name}'s last layer",
        family=name,
    )
    for name in FAMILIES
)
_KINDS = ("Gemma2", "Gemma3", "GptOss", "Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe")
_FORWARD = "transformers.models.{0}.modeling_{0}:{1}Attention.forward"
CACHED_ATTENTION = tuple(
    Interface(_FORWARD.format(name, kind), f"{name}'s last layer", family=name, mark=mark)
    for name, kind in zip(FAMILIES, _KINDS, strict=True)
    for mark in ("past_key_values", "update")
)
# transformers: models
CLASSIFIER = Interface(
    "transformers.modeling_layers:GenericForSequenceClassification", "knowing a classifier"
)
LOADED_MARK = Interface(
    "transformers.initialization:normal_",
    "telling weights that were loaded from drawn ones",
    mark="_is_hf_initialized",
)
# transformers: what programs trace, and what they give
CAUSAL_OUTPUT = Interface(
    "transformers.modeling_outputs:CausalLMOutputWithPast", "what ordinary calls return", "programs"
)
CLASSIFIER_OUTPUT = Interface(
    "transformers.modeling_outputs:SequenceClassifierOutputWithPast",
    "what ordinary calls of a classifier return",
    "programs",
)
MODEL_OF_CONFIG = Interface(
    "transformers:PreTrainedModel._from_config", "a skeleton of the model", "programs"
)
MODEL_CLASSES = Interface(
    "transformers:AutoModelForCausalLM._model_mapping",
    "the model that is compiled for a chip that is not there",
    "programs",
)
EXPERTS_REGISTRY = Interface(
    "transformers.integrations.moe:ExpertsInterface.register", "a mixture's experts", "programs"
)
EXPERTS_NAME_KEPT = Interface(
    "transformers:PreTrainedConfig._experts_implementation.fget",
    "setting the name of a mixture's experts",
    "programs",
    mark="_experts_implementation_internal",
)
_QWEN3 = "transformers.models.qwen3.modeling_qwen3:Qwen3"
_QWEN3_MOE = "transformers.models.qwen3_moe.modeling_qwen3_moe:Qwen3Moe"
FUSED_LAYERS = tuple(
    Interface(f"{family}DecoderLayer", "layers whose products run through kernels", "programs")
    for family in (_QWEN3, _QWEN3_MOE)
)
FUSED_MLPS = tuple(
    Interface(f"{family}MLP", "MLPs that run through a kernel", "programs")
    for family in (_QWEN3, _QWEN3_MOE)
)
MIXTURE = Interface(
    f"{_QWEN3_MOE}SparseMoeBlock", "a mixture whose experts run through a kernel", "programs"
)
# Parts of a decoder that programs call one by one, from the first layer of layers that are equal:
# of all, of those whose products run through kernels, and of a mixture.
PARTS = {
    "decoder": ("embed_tokens", "rotary_emb", "norm", "layers.0"),
    "layer": (
        *("layers.0.input_layernorm.variance_epsilon", "layers.0.self_attn.scaling"),
        *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"layers.0.self_attn.{name}_norm.weight" for name in "qk"),
        *("layers.0.post_attention_layernorm.variance_epsilon", "layers.0.mlp"),
    ),
    "mlp": (
        *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        *("layers.0.mlp.hidden_size", "layers.0.mlp.intermediate_size"),
    ),
    "experts": (
        *("layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"),
        *("layers.0.mlp.experts.act_fn", "layers.0.mlp.gate"),
    ),
}
# transformers: files of a checkpoint
FIND_FILE = Interface("transformers.utils.hub:cached_file", "finding a tokenizer", "loading")
FIND_QUIETLY = Interface(
    "transformers.utils.hub:cached_files",
    "finding a tokenizer",
    "loading",
    mark="_raise_exceptions_for_missing_entries",
)
FIND_ADAPTER = Interface(
    "transformers.utils.peft_utils:find_adapter_config_file", "loading an adapter", "loading"
)
INITIALIZE = Interface("transformers:PreTrainedModel._init_weights", "loading in parts", "loading")
# transformers: pipelines
PIPELINES = Interface("transformers.pipelines:PIPELINE_REGISTRY", "a pipeline's task", "pipeline")
PIPELINE_RECORD = Interface(
    "transformers.pipelines.base:PipelineRegistry.register_pipeline",
    "a task that is saved without a copy of its code",
    "pipeline",
    mark="_registered_impl",
)
_PIPELINE = "transformers:Pipeline.__init__"
PIPELINE_OPTIONS = Interface(_PIPELINE, "its options", "pipeline", mark="_forward_params")
PIPELINE_BATCH = Interface(_PIPELINE, "its batch_size", "pipeline", mark="_batch_size")
PIPELINE_WORKERS = Interface(_PIPELINE, "its num_workers", "pipeline", mark="_num_workers")
# Where a torchax tensor keeps its jax array; packscore.programs.interfaces asks torchax for it.
TORCHAX_ARRAY = "_elem"

TABLE: tuple[Interface, ...] = tuple(
    one
    for value in list(globals().values())
    for one in (value if isinstance(value, tuple) else (value,))
    if isinstance(one, Interface)
)


def check_patching(model_type: str | None = None) -> None:
    """Ask for all that scoring in torch reads; of a family, what its own code has to have.

    Raises:
      UnsupportedVersionError: something is not there.
    """
    family = model_type and folder_of(model_type)
    check(one for one in TABLE if one.when == "patch" and one.family == family)


def folder_of(model_type: str) -> str:
    """The one of `FAMILIES` that a kind of model is of."""
    return model_type.removesuffix("_text")


def check_programs() -> None:
    """Ask for all that programs read of torch and transformers.

    Raises:
      UnsupportedVersionError: something is not there.
    """
    check(one for one in TABLE if one.when == "programs")


def check_parts(decoder: Any) -> None:
    """Ask a decoder for the parts that programs call.

    Raises:
      UnsupportedVersionError: one is not there.
    """
    kind = decoder.config.model_type
    _check_parts(decoder, "decoder")
    if kind in ("qwen3", "qwen3_moe"):
        _check_parts(decoder, "layer")
        mlp = type(decoder.layers[0].mlp)  # a mixture may have layers without experts
        is_plain = kind == "qwen3" or mlp in [known() for known in FUSED_MLPS]
        _check_parts(decoder, "mlp" if is_plain else "experts")


def _check_parts(decoder: Any, kind: str) -> None:
    for path in PARTS[kind]:
        try:
            operator.attrgetter(path)(decoder)
        except AttributeError as error:
            name = f"{type(decoder).__name__}.{path}"
            raise _missing("transformers", name, "tracing a model part by part") from error


def check_pipelines() -> None:
    """Ask for all that a pipeline reads.

    Raises:
      UnsupportedVersionError: something is not there.
    """
    check(one for one in TABLE if one.when == "pipeline")


def check_loading() -> None:
    """Ask for all that loading a checkpoint reads.

    Raises:
      UnsupportedVersionError: something is not there.
    """
    check(one for one in TABLE if one.when == "loading")


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """The forward hooks of a module, and those before a forward."""
    own: Any = module.__dict__
    return (*own[FORWARD_HOOKS.name].values(), *own[FORWARD_PRE_HOOKS.name].values())


def global_hooks() -> tuple[Any, ...]:
    """The same of all modules at once."""
    return (*GLOBAL_FORWARD_HOOKS().values(), *GLOBAL_FORWARD_PRE_HOOKS().values())


def attention_name(config: Any) -> str | None:
    """The name of the attention that a configuration asks for."""
    name: str | None = config._attn_implementation
    return name


def set_attention_name(config: Any, name: str) -> None:
    """Write it, whatever transformers thinks of the name."""
    config._attn_implementation_internal = name


def set_experts_name(config: Any, name: str) -> None:
    """The same of a mixture's experts."""
    config._experts_implementation_internal = name


# What follows runs inside a forward, where torch.compile reads it: plain look-ups, of names that
# were asked for when the model was patched.


def attention_function(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention that transformers has by a name, of one module; "eager" is its own file's."""
    forward: Callable[..., Any]
    if name == "eager":
        forward = sys.modules[type(module).__module__].eager_attention_forward
    else:
        forward = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS[name]
    return forward


def apply_rotary(attention: nn.Module) -> Callable[..., Any]:
    """What rotates (queries, keys) by (cosine, sine) in an attention's own file."""
    rotate: Callable[..., Any] = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate


def fused_attention() -> Callable[..., Any]:
    """torch's fused attention on the CPU: (output, log-sum-exp)."""
    fused: Callable[..., Any] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused
