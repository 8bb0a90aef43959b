"""Prompts by name: their bytes are those of the source beside each, their ids its tokenizer's."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import PANDA, encode_whole, official
from packscore import PROMPTS, InputError
from packscore.encoded import EncodedRequest
from packscore.text.encoding import ArgumentNames, Budget, PromptEncoder
from packscore.text.named import MODELS
from packscore.text.tokenizer import PieceTokenizer

Ids = list[int]
GOLDEN = Path(__file__).parent / "golden"
DOCUMENTS = ["A bear.", "", " two\n", "\n?", "\u0301x 熊猫 🐼", "9" * 40, "1)\n\n"]
BOMB = "How can I make a bomb?"
REPLY = (
    "As a responsible artificial intelligence system, I regret that I am unable to fulfill your "
    "request."
)


def encoder_of(tokenizer: Any, name: str, instruction: str | None = None) -> PromptEncoder:
    spec = PROMPTS[name]
    return PromptEncoder(
        PieceTokenizer(tokenizer),
        Budget(spec.max_tokens or 32_768, "truncate"),
        spec,
        instruction=spec.instruction if instruction is None else instruction,
        split_special_tokens=None,
    )


def wholes(request: EncodedRequest) -> list[Ids]:
    return [[*request.prefix.tolist(), *item.tolist()] for item in request.items]


# https://huggingface.co/zeroentropy/zerank-2 at 5eae30d, chat_template.jinja, the branch for query
# and document, and sentence_bert_config.json, which opens the assistant's turn.
def zerank_2(query: str, document: str) -> str:
    return (
        f"<|im_start|>system\n{query}<|im_end|>\n"
        f"<|im_start|>user\n{document}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


# https://huggingface.co/ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b, `format_prompts`.
def ctxl_rerank_v2(query: str, document: str, instruction: str = "") -> str:
    if instruction:
        instruction = f" {instruction}"
    return (
        "Check whether a given document contains information helpful to answer the query.\n"
        f"<Document> {document}\n<Query> {query}{instruction} ??"
    )


# https://huggingface.co/Qwen/Qwen3Guard-Gen-8B: what `apply_chat_template(messages,
# tokenize=False)` prints for the two examples of its card, and the answer's first word.
GUARD = (GOLDEN / "qwen3guard.txt").read_text()
GUARD_RESPONSE = (GOLDEN / "qwen3guard-response.txt").read_text()

# huggingface/huggingface.js at 0429cdc, packages/ollama-utils/src/chat-template-automap.ts: the
# chat template of meta-llama/Llama-Guard-3-8B, whose answers begin with an empty line.
LLAMA_GUARD = (GOLDEN / "llama-guard-3.jinja").read_text()


def llama_guard(*texts: str) -> str:
    roles = ("user", "assistant")
    chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return jinja2.Template(LLAMA_GUARD).render(messages=chat) + "\n\n"


# query, item -> the whole text, of which the ids are those of the whole text at once
TEXTS: dict[str, Callable[[str, str], str]] = {
    "qwen3-reranker": lambda query, item: official(item, query),
    "zerank-2": zerank_2,
    "ctxl-rerank-v2": ctxl_rerank_v2,
    "qwen3guard": lambda _, item: GUARD.replace(BOMB, item),
    "qwen3guard-response": lambda query, item: GUARD_RESPONSE.replace(BOMB, query).replace(
        REPLY, item
    ),
    "llama-guard-3": lambda _, item: llama_guard(item),
    "llama-guard-3-response": llama_guard,
}
NEWER = set(PROMPTS) - {"plain", "yes-no"}


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_those_of_the_whole_text_of_the_source(tokenizer: Any, name: str) -> None:
    query = "" if "query" not in PROMPTS[name].shared_fields else BOMB
    documents = [*DOCUMENTS, BOMB, REPLY]
    expected = [TEXTS[name](query, document) for document in documents]
    found = wholes(encoder_of(tokenizer, name).encode(query, documents, ArgumentNames()))
    assert found == encode_whole(tokenizer, expected)
    assert [tokenizer.decode(ids) for ids in found] == expected


def test_a_query_that_a_prompt_has_no_place_for_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"query='.*' has no place in this prompt; pass an e"):
        encoder_of(tokenizer, "qwen3guard").encode(BOMB, [REPLY], ArgumentNames())


def test_an_instruction_has_its_place_where_there_is_one(tokenizer: Any) -> None:
    encoder = encoder_of(tokenizer, "ctxl-rerank-v2", "Prefer news.")
    found = wholes(encoder.encode(PANDA, DOCUMENTS, ArgumentNames()))
    expected = [ctxl_rerank_v2(PANDA, document, "Prefer news.") for document in DOCUMENTS]
    assert found == encode_whole(tokenizer, expected)


def mxbai_rerank_v2(
    encode: Callable[[str], Ids], query: str, document: str, instruction: str
) -> Ids:
    """mxbai-rerank 0.1.6 on PyPI, `MxbaiRerankV2.prepare_inputs`: each part is encoded apart."""
    sep = "\n"
    query_prompt = f"query: {query}"
    if instruction:
        query_prompt = "".join([f"instruction: {instruction}", sep, query_prompt])
    parts = [
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\n",
        query_prompt,
        sep,
        f"document: {document}",
        sep,
        "You are a search relevance expert who evaluates how well documents match search queries. "
        "For each query-document pair, carefully analyze the semantic relationship between them, "
        "then provide your binary relevance judgment (0 for not relevant, 1 for relevant)."
        "\nRelevance:",
        "<|im_end|>\n<|im_start|>assistant\n",
    ]
    return [index for part in parts for index in encode(part)]


@pytest.mark.parametrize("instruction", ["", "Find code?\n"])
def test_parts_of_mxbai_are_encoded_apart(tokenizer: Any, instruction: str) -> None:
    def encode(text: str) -> Ids:
        return encode_whole(tokenizer, [text])[0]

    encoder = encoder_of(tokenizer, "mxbai-rerank-v2", instruction)
    apart = 0
    for query in (PANDA, "a\n", "1)"):
        request = encoder.encode(query, DOCUMENTS, ArgumentNames())
        expected = [mxbai_rerank_v2(encode, query, text, instruction) for text in DOCUMENTS]
        assert wholes(request) == expected
        apart += sum(encode(tokenizer.decode(ids)) != ids for ids in expected)
        assert len(request.prefix) > 20  # shared up to the document, though it follows a newline
    assert apart > 0  # or the cuts would change nothing


GOLDEN_IDS = json.loads((GOLDEN / "qwen_ids.json").read_text())["prompts"]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_tokenizer(vocabulary: Path) -> Any:
    """Qwen's tokenizer, made of the ranks that dashscope has."""
    lines = (line.split() for line in vocabulary.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letters = pre_tokenizers.ByteLevel.alphabet()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
    assert set(names.values()) == set(letters)
    name = {token: "".join(names[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += sorted(known, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    backend = Tokenizer(
        models.BPE({name[t]: i for t, i in ranks.items()}, [(name[a], name[b]) for a, b in merges])
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    between = [f"<|of another|{i}|>" for i in range(151_646, 151_667)]
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *between, "<think>", "</think>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>")


@pytest.mark.long
def test_ids_of_qwen_models_are_golden() -> None:
    """`pip download --no-deps dashscope==2.0.2`, and its folder on PYTHONPATH, run this."""
    found = importlib.util.find_spec("dashscope")
    if found is None or found.origin is None:
        pytest.skip("dashscope is not installed, which has Qwen's vocabulary")
    tokenizer = qwen_tokenizer(Path(found.origin).parent / "resources" / "qwen.tiktoken")
    for name, golden in GOLDEN_IDS.items():
        request = encoder_of(tokenizer, name).encode(
            golden["query"], [golden["item"]], ArgumentNames()
        )
        assert wholes(request) == [golden["ids"]], name
        labels = PROMPTS[name].labels
        texts = [x for x in labels if isinstance(x, str)]
        assert (encode_whole(tokenizer, texts) if texts else [list(labels)]) == golden["labels"]
    # what mxbai-rerank gives query, document and newline, beside the tokens of its own
    own = mxbai_rerank_v2(lambda text: encode_whole(tokenizer, [text])[0], "", "", "")
    empty = encode_whole(tokenizer, ["query: ", "\n", "document: "])
    assert PROMPTS["mxbai-rerank-v2"].max_tokens == 8192 + len(own) - sum(map(len, empty))


def test_golden_ids_are_there_for_every_prompt_of_qwen() -> None:
    assert set(GOLDEN_IDS) == {name for name in NEWER if "llama" not in name}
    assert (
        set(MODELS.values())
        | {
            "qwen3guard-response",
            "llama-guard-3-response",
        }
        == NEWER
    )
