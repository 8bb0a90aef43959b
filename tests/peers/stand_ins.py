"""Small checkpoints under the names that other libraries' tests ask the hub for.

They lie in a folder laid out as the hub's own cache, which libraries that are told to stay offline
read by themselves: nothing of the libraries is replaced, and both CrossEncoders load the same.
"""

from __future__ import annotations

import ast
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Qwen3Model,
)

from packscore import shipped_model_path

MAIN = "0" * 40
BERT = "cross-encoder-testing/reranker-bert-tiny-gooaq-bce"
EMBEDDER = "sentence-transformers-testing/stsb-bert-tiny-safetensors"
LATEST, OLDER = (
    "f3cb857cba53019a20df283396bcca179cf051a4",
    "ba33022fdf0b0fc2643263f0726f44d0a07d0e24",
)
MODEL_CARD = "---\nlibrary_name: sentence-transformers\n---\n\n# A reranker\n"
TANH = "torch.nn.modules.activation.Tanh"


def write(cache: Path, checkout: Path) -> None:
    """Write every stand-in that sentence-transformers' tests of the CrossEncoder need.

    Args:
      cache: folder that becomes `HF_HUB_CACHE`.
      checkout: of sentence-transformers, for the ranking that one of its tests expects.
    """
    base = _base(seed=0)
    for revision in (MAIN, LATEST):
        _save(cache, EMBEDDER, base, revision)
    _save(cache, EMBEDDER, _base(seed=1), OLDER)
    _save(cache, "distilbert/distilroberta-base", base)
    _save(cache, "google-bert/bert-base-uncased", base)
    bert = _save(cache, BERT, _classifier(1))
    saved = snapshot(cache, f"{BERT}-STv54")
    CrossEncoder(str(bert)).save_pretrained(str(saved))
    (saved / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    _save(cache, f"{BERT}-tanh-v3", _classifier(1, sbert_ce_default_activation_function=TANH))
    activation = {"activation_fn": TANH, "version": "4.0.1"}
    _save(cache, f"{BERT}-tanh-v4", _classifier(1, sentence_transformers=activation))
    _save(cache, "cross-encoder/nli-MiniLM2-L6-H768", _classifier(3))
    _save(cache, "BAAI/bge-reranker-base", _classifier(1), max_length=512)
    _save(cache, "cross-encoder/stsb-distilroberta-base", _ranker(checkout))
    _save_rerankers(cache)


def snapshot(cache: Path, name: str, revision: str = MAIN) -> Path:
    """The folder of a hub's name; the name points to the revision that is made first."""
    repo = cache / f"models--{name.replace('/', '--')}"
    folder = repo / "snapshots" / revision
    folder.mkdir(parents=True, exist_ok=True)
    (repo / "refs").mkdir(exist_ok=True)
    if not (repo / "refs" / "main").exists():
        (repo / "refs" / "main").write_text(revision)
    return folder


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of the kind that BERT has, whose words are letters: it knows every text.

    It adds no tokens to a pair, as those of decoders do.
    """
    signs = sorted({*string.printable.lower()} - {*string.whitespace})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{sign}" for sign in signs)]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": f"[{name.upper()}]" for name in names}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **special)


def _config(**options: Any) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(letters()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
        classifier_dropout=None,
        **options,
    )


def _drawn(make: Callable[[Qwen3Config], Any], seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = make(_config(**options)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # texts must make a difference, and bfloat16 little
            weight.mul_(5 if "proj" in name else 1)
    return model


def _base(seed: int) -> Any:
    return _drawn(Qwen3Model, seed)


def _classifier(num_labels: int, **options: Any) -> Any:
    return _drawn(Qwen3ForSequenceClassification, 0, num_labels=num_labels, **options)


def _ranker(checkout: Path) -> Any:
    """A classifier fitted to the ranking that a test of the checkout expects."""
    source = (checkout / "tests/cross_encoder/test_model.py").read_text(encoding="utf-8")
    (test,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "test_rank"
    )
    wanted = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in test.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant | ast.List)
    }
    model, tokenizer = _classifier(1), letters()
    order = wanted["expected_ranking"]
    with torch.no_grad():
        pooled = [
            model.model(**tokenizer(wanted["query"], text, return_tensors="pt"))[0][0, -1]
            for text in wanted["corpus"]
        ]
        scores = torch.tensor([-float(order.index(i)) for i in range(len(order))])
        model.score.weight[0] = torch.linalg.lstsq(
            torch.stack(pooled), scores[:, None], driver="gelsd"
        ).solution[:, 0]
    return model


def _save(
    cache: Path, name: str, model: Any, revision: str = MAIN, *, max_length: int = 512
) -> Path:
    folder = snapshot(cache, name, revision)
    model.save_pretrained(folder)
    tokenizer = letters()
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)
    return folder


def _save_rerankers(cache: Path) -> None:
    """The model inside packscore, as it is and as a classifier of the same scores."""
    path = shipped_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    causal: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    folder = snapshot(cache, "Qwen/Qwen3-Reranker-0.6B")
    causal.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = Qwen3Config.from_pretrained(path, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    classifier: Any = Qwen3ForSequenceClassification(config).float()
    classifier.model.load_state_dict(causal.model.state_dict())
    no, yes = tokenizer.convert_tokens_to_ids(["no", "yes"])
    with torch.no_grad():
        head = causal.get_output_embeddings().weight
        classifier.score.weight[0] = head[yes] - head[no]
    folder = snapshot(cache, "tomaarsen/Qwen3-Reranker-0.6B-seq-cls")
    classifier.save_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
