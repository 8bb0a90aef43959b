"""Models whose programs are read: every family, head and way to compute a layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import transformers

from helpers import SMALL
from packscore import shipped_model_path

# in float32 its weights are too large for the kernels
LAYERS_OF_8B = {
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
KERNELS = {"head_dim": 128, "hidden_size": 256, "intermediate_size": 512}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WINDOW = {"sliding_window": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}


class Model(NamedTuple):
    """A model by its shapes."""

    architecture: str
    config: Any


def model(family: str, head: str = "CausalLM", **options: Any) -> Model:
    config_class = getattr(transformers, f"{family}Config")
    return Model(f"{family}For{head}", config_class(**{**SMALL, **options}))


# Those that are exact under a dense mask alone.
MASKED = ("qwen3-window", "mistral", "gemma2")
MODELS = {
    "shipped": Model(
        "Qwen3ForCausalLM", transformers.AutoConfig.from_pretrained(shipped_model_path())
    ),
    "qwen3-8B-layers": model("Qwen3", **LAYERS_OF_8B),
    "qwen3-kernels": model("Qwen3", **KERNELS),
    "qwen3-own-mlp": model("Qwen3", **{**KERNELS, "intermediate_size": 320}),
    "qwen3-yarn-bias": model("Qwen3", head_dim=64, attention_bias=True, rope_parameters=YARN),
    "qwen2": model("Qwen2"),
    "llama": model("Llama", head_dim=32, rope_parameters=LLAMA3),
    "llama-bias-gelu": model("Llama", attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "qwen3_moe": model("Qwen3Moe", head_dim=32, **MIXTURE),
    "qwen3_moe-kernels": model("Qwen3Moe", norm_topk_prob=True, **KERNELS, **MIXTURE),
    "qwen3-window": model("Qwen3", **KERNELS, **WINDOW, use_sliding_window=True),
    "mistral": model("Mistral", head_dim=32, **WINDOW),
    "gemma2": model("Gemma2", head_dim=32, **WINDOW),
    "qwen3-classes": model("Qwen3", "SequenceClassification", head_dim=64),
    "qwen2-classes": model("Qwen2", "SequenceClassification"),
    "llama-classes": model("Llama", "SequenceClassification"),
    "qwen3_moe-classes": model("Qwen3Moe", "SequenceClassification", head_dim=32, **MIXTURE),
}
