"""Models, inputs and the one-by-one reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from packscore import MultiItemScorer

VOCAB_SIZE = 320
LABELS = [5, 17, 300, 2, 44, 45, 46, 47]
# the shape of Qwen3-0.6B
QWEN3 = Qwen3Config(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
)
PANDA = "what is a panda?"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
# typed from the model card, not from the package
OFFICIAL = (
    "<|im_start|>system\n"
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
    "<Instruct>: {instruction}\n"
    "<Query>: {query}\n"
    "<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n"
    "<think>\n"
    "\n"
    "</think>\n"
    "\n"
)


@dataclass(frozen=True)
class FrozenCase:
    """A query and items as token ids."""

    prefix: list[int]
    items: list[list[int]]
    labels: list[int] = field(default_factory=lambda: LABELS)


def random_ids(count: int, vocab_size: int = VOCAB_SIZE, *, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + count)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()


def spread_scores(model: Any, seed: int = 0) -> Any:
    """Weights at which attention is sharp and probabilities differ: errors have nowhere to hide."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = parameter.shape[-1] ** -0.5
            if "embed_tokens" in name or "lm_head" in name:
                std *= 2  # logits of N(0, 2), as the hidden state behind the norm is about N(0, 1)
            with torch.no_grad():
                parameter.normal_(0, std, generator=generator)
    return model.eval()


def random_qwen3(
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_layers: int = 2,
    tied: bool = True,
    seed: int = 0,
    **options: Any,
) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        **options,
    )
    return spread_scores(Qwen3ForCausalLM(config), seed)


SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def random_decoder(family: str, **options: Any) -> PreTrainedModel:
    """A small random model of one supported family."""
    if family == "qwen3":
        return random_qwen3(**options)
    if family == "qwen2":
        model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**{**SMALL, **options}))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **options}))
    else:
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SMALL, **moe, "head_dim": 16, **options}))
    return spread_scores(model, seed=0)


CLASSIFIERS: dict[str, Any] = {
    "qwen3": (Qwen3Config, Qwen3ForSequenceClassification),
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification),
    "llama": (LlamaConfig, LlamaForSequenceClassification),
}


def random_classifier(family: str = "qwen3", num_labels: int = 2, **options: Any) -> Any:
    """A small random sequence classifier, with a padding token that its inputs may hold."""
    config_class, model_class = CLASSIFIERS[family]
    sizes = {**SMALL, "pad_token_id": 0, "num_labels": num_labels, **options}
    return spread_scores(model_class(config_class(**sizes)), seed=0)


FAMILIES = ("qwen3", "qwen3_moe", "qwen2", "llama")


@torch.no_grad()
def logits_one_by_one(
    model: PreTrainedModel, prefix: Sequence[int], items: Sequence[Sequence[int]]
) -> torch.Tensor:
    """The contract: every item alone behind the query, through the model's own whole forward.

    Returns:
      float32[num_items, vocab_size], the logits at each last token.
    """
    rows = []
    for item in items:
        ids = torch.tensor([[*prefix, *item]])
        rows.append(model(input_ids=ids, use_cache=False).logits[0, -1].float())
    return torch.stack(rows)


def one_by_one(
    model: PreTrainedModel,
    prefix: Sequence[int],
    items: Sequence[Sequence[int]],
    label_ids: Sequence[int],
    *,
    apply_softmax: bool = False,
) -> torch.Tensor:
    """float32[num_items, num_labels]: the scores that packing has to reproduce."""
    return probabilities(logits_one_by_one(model, prefix, items), label_ids, apply_softmax)


def probabilities(
    logits: torch.Tensor, label_ids: Sequence[int], apply_softmax: bool
) -> torch.Tensor:
    """Label probabilities over the labels or over the vocabulary."""
    chosen = list(label_ids)
    return logits[:, chosen].softmax(-1) if apply_softmax else logits.softmax(-1)[:, chosen]


def encode_whole(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def official(document: str, query: str = PANDA) -> str:
    return OFFICIAL.format(instruction=INSTRUCTION, query=query, document=document)


def lease_of(prefix: Any) -> Any:
    """The pages that a held query has; the one place that knows where they are."""
    return prefix._held._lease


def engine_of(scorer: MultiItemScorer) -> Any:
    """What runs a scorer's launches now; the one place that knows where it is."""
    return scorer._core.copies.first
