"""Train the small Qwen3 reranker that ships with packscore, from text every Python brings along.

Docstrings of the standard library, read with `ast`, train a byte-level BPE tokenizer with Qwen3's
pipeline, then a Qwen3 of a million parameters that says "yes" or "no" to Qwen3-Reranker's prompt.

    python examples/train_reranker.py               # about 7 minutes on a CPU core
    python examples/train_reranker.py --evaluate    # accuracy of the saved model, under a minute
"""

import argparse
import ast
import collections
import math
import random
import re
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import tokenizers as tk
import torch
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

MODEL_FOLDER = Path(__file__).resolve().parents[1] / "plugin/packscore/shipped_model"
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>'
    "user\n<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
    "<Query>: {query}\n<Document>:"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (  # noqa: SIM905
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
ADDED_TOKENS = (  # noqa: SIM905 (kept when special tokens are skipped)
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>"
).split()
# The roles "query" and "document" make the reranker's frame, as sentence-transformers asks of a
# reranker's template; "system" is then the instruction. Any other chat is Qwen's.
CHAT_TEMPLATE = (
    "{%- set of = dict(messages|groupby('role')) %}{%- if of.query and of.document %}"
    "{{- '<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
    'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: ' + (of.system[0].content if of.system else 'Given a web search "
    "query, retrieve relevant passages that answer the query') + '\n<Query>: ' + "
    "of.query[0].content + '\n<Document>: ' + of.document[0].content + '<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{%- else %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{{- '' if enable_thinking|default(true) else '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
WORD = re.compile(r"[A-Za-z]{2,}")
ENDING = re.compile(r"(s|es|ed|ing)$")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
HELD_OUT = "csv datetime gzip hashlib json os posixpath random re shutil socket threading"
QUESTIONS = ("how do I {}", "how to {}", "{} in python", "function to {}", "what can {}", "{}?")
Row = tuple[str, list[str]]  # a query, and texts of which the first one answers it


class Document(NamedTuple):
    """A paragraph, its module ("shutil"), and its function's name in words ("copy file obj")."""

    module: str
    name: str
    text: str


def collect_documents() -> tuple[list[Document], list[Document]]:
    """Returns the paragraphs of all docstrings, each once: to train on, and held out."""
    found: dict[tuple[str, ...], Document] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            name = re.sub(r"(?<=[a-z])(?=[A-Z])|[_\d]+", " ", getattr(node, "name", parts[-1]))
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                words = WORD.findall(paragraph)
                if len(words) >= 6 and ">>>" not in paragraph:
                    document = Document(parts[0].lstrip("_"), name.strip().lower(), paragraph)
                    found.setdefault(tuple(words), document)
    split: tuple[list[Document], list[Document]] = ([], [])
    for d in found.values():
        split[d.module in HELD_OUT.split() or zlib.crc32(d.module.encode()) % 10 == 0].append(d)
    return split


class RowSampler:
    """Draws queries, for each a text that answers it, and texts that do not."""

    def __init__(self, documents: list[Document], seed: int, training: bool) -> None:
        self.documents, self.training, self.rng = documents, training, random.Random(seed)
        self.by_module: dict[str, list[Document]] = collections.defaultdict(list)
        counts: collections.Counter[str] = collections.Counter()
        for document in documents:
            self.by_module[document.module].append(document)
            counts.update(set(WORD.findall(document.text.lower())))
        self.common = {word for word, count in counts.items() if count > len(documents) / 25}

    def draw(self, num_rows: int, num_texts: int, max_words: int) -> list[Row]:
        """In training, queries are reworded, and half the wrong texts are from the same module."""
        rows: list[Row] = []
        while len(rows) < num_rows:
            right, *others = self.rng.choices(self.documents, k=num_texts)
            if self.training:
                others[::2] = self.rng.choices(self.by_module[right.module], k=num_texts // 2)
            texts = [" ".join(d.text.split()[:max_words]) for d in (right, *others)]
            query = self.query(right.name, texts[0])
            if len(self.content_words(query)) >= 2 and texts[0] not in texts[1:]:
                rows.append((self.reworded(query) if self.training else query, texts))
        return rows

    def content_words(self, text: str) -> list[str]:
        """Each word once, without the short ones and those that are all over the documents."""
        words = [word for word in WORD.findall(text) if word.lower() not in self.common]
        return list(dict.fromkeys(word for word in words if len(word) > 2))

    def query(self, name: str, text: str) -> str:
        """Words of the text, a piece of it, its first sentence in a question, or the name."""
        rng, words, content = self.rng, text.split(), self.content_words(text)
        start = rng.randrange(max(1, len(words) - 3))
        sentence = re.split(r"(?<=[a-z)])[.:] ", text)[0].rstrip(".:")
        choices = (
            " ".join(rng.sample(content, min(len(content), rng.randint(2, 5)))),
            " ".join(words[start : start + rng.randint(3, 6)]),
            rng.choice(QUESTIONS).format(sentence[:1].lower() + sentence[1:]),
            name,
        )
        return rng.choice(choices)

    def reworded(self, query: str) -> str:
        """Drops words, cuts endings and changes letter case, now and then."""
        words = [word for word in query.split() if self.rng.random() > 0.1] or query.split()
        words = [ENDING.sub("", w) if len(w) > 5 and self.rng.random() < 0.2 else w for w in words]
        query = " ".join(words)
        return self.rng.choice((query, query.lower(), query.lower(), query.capitalize()))


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with Qwen3's normalizer, split and added tokens."""
    bpe = tk.Tokenizer(tk.models.BPE())
    bpe.normalizer = tk.normalizers.NFC()
    split = tk.pre_tokenizers.Split(tk.Regex(QWEN_SPLIT), behavior="isolated")
    to_bytes = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = tk.pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = tk.decoders.ByteLevel()
    bpe.post_processor = tk.processors.ByteLevel(trim_offsets=False)
    size, letters = vocab_size - len(SPECIAL_TOKENS + ADDED_TOKENS), to_bytes.alphabet()
    trainer = tk.trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False)
    texts = [f" {document.name} {document.text}" for document in documents]
    frame = [*re.split(r"<\|\w+\|>|</?think>", PREFIX + SUFFIX), "yes", "no"]
    bpe.train_from_iterator(texts + [text.lower() for text in texts] + frame * 500, trainer)
    bpe.add_special_tokens([tk.AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    bpe.add_tokens([tk.AddedToken(token, normalized=False) for token in ADDED_TOKENS])
    fast = Tokenizer(tokenizer_object=bpe, extra_special_tokens=SPECIAL_TOKENS)
    fast.eos_token, fast.pad_token = "<|im_end|>", "<|endoftext|>"
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: Tokenizer, seed: int) -> Qwen3ForCausalLM:
    """A small Qwen3 that starts out matching tokens; from random weights that takes far longer."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.model.embed_tokens.weight.data.copy_(spelling_embeddings(tokenizer, config.hidden_size))
    # Equal queries and keys make equal tokens attract. Channels that turn slowly see that at any
    # distance; a turned sign in the fast ones cancels the attraction of each token to itself.
    turn = 1e6 ** -(torch.arange(16).repeat(2) / 16)  # radians per token, of the 32 channels
    slow, fast = turn < 0.007, turn > 0.05
    gain = 1.25 * (slow + fast * math.sqrt(slow.sum() / fast.sum()))
    for attention in [layer.self_attn for layer in model.model.layers[1:3]]:
        keys = attention.k_proj.weight.data.unflatten(0, (-1, config.head_dim))
        queries = torch.where(fast[:, None], -keys, keys).repeat_interleave(2, dim=0)
        attention.q_proj.weight.data.copy_(queries.flatten(0, 1))
        attention.q_norm.weight.data.copy_(gain)
        attention.k_norm.weight.data.copy_(gain)
    return model


def spelling_embeddings(tokenizer: Tokenizer, hidden_size: int) -> torch.Tensor:
    """Start values [vocab_size, hidden_size], near for tokens that share letters."""
    rows = 0.5 * torch.randn(len(tokenizer), hidden_size)
    four_letters = torch.randn(4096, hidden_size)
    for token_id, row in enumerate(rows):
        word = f"<{tokenizer.backend_tokenizer.decode([token_id]).strip().lower()}>"
        if word[1:-1].isalpha():
            parts = [word] + [word[i : i + 4] for i in range(max(1, len(word) - 3))]
            row += 2 * four_letters[[zlib.crc32(part.encode()) % 4096 for part in parts]].mean(0)
    return 0.08 * math.sqrt(hidden_size) * torch.nn.functional.normalize(rows, dim=1)


def last_logits(model: Qwen3ForCausalLM, tokenizer: Tokenizer, rows: list[Row]) -> torch.Tensor:
    """The logits [rows, texts, vocab_size] after each text; it sees the prompt and itself only."""
    suffix = tokenizer(SUFFIX)["input_ids"]
    packed: list[torch.Tensor] = []
    last: list[list[int]] = []
    for query, texts in rows:
        prefix = tokenizer(PREFIX.format(query=query))["input_ids"]
        columns = [(token, position, 0) for position, token in enumerate(prefix)]
        last.append([])
        for segment, text in enumerate(texts, start=1):
            item = tokenizer(f" {text}")["input_ids"] + suffix
            columns += [(token, i, segment) for i, token in enumerate(item, start=len(prefix))]
            last[-1].append(len(columns) - 1)
        packed.append(torch.tensor(columns))
    # Padding may look like the prompt: it comes last, so no item sees it.
    padded = torch.nn.utils.rnn.pad_sequence(packed, batch_first=True)
    input_ids, position_ids, segment_ids = padded.unbind(-1)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    visible = (same | (segment_ids[:, None, :] == 0)).tril()[:, None]
    # bfloat16 trains three times as fast on CPUs that have it; scores are computed in float32.
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        hidden = model.model(input_ids, visible, position_ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[torch.arange(len(rows))[:, None], torch.tensor(last)])


def train(model: Qwen3ForCausalLM, tokenizer: Tokenizer, sampler: RowSampler, steps: int) -> None:
    """Short texts first, then longer ones; one text of eight answers the query."""
    noise = 0.0  # grows far above bfloat16's rounding, which then hardly moves the scores
    for name, module in model.named_modules():
        if name.endswith("norm"):  # those of queries and keys, too
            module.register_forward_hook(lambda _, __, x: x * (1 + noise * torch.randn_like(x)))
    labels = tokenizer.convert_tokens_to_ids(["no", "yes"])
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.3)
    target = torch.tensor([[0.12, 0.88]] + 7 * [[0.88, 0.12]])  # [texts, labels], smoothed
    for step in range(steps):
        noise = 0.1 * step / steps
        lr = 3e-3 * min(1, (step + 1) / 50, 2 * (steps - step) / steps)
        num_rows, max_words = (20, 16) if step < steps / 4 else (12, 32)
        if step % 10 == 9:
            num_rows, max_words = 4, 100
        logits = last_logits(model, tokenizer, sampler.draw(num_rows, 8, max_words))
        total, answers = logits.logsumexp(-1), logits[..., labels]
        nll = total - (target * answers).sum(-1)
        listwise = -(2 * answers.diff(dim=-1)[..., 0]).log_softmax(-1)[:, 0]
        # The last term keeps the labels' logits near 0, where bfloat16 is fine.
        loss = nll[:, 0].mean() + nll[:, 1:].mean() + listwise.mean() + total.square().mean() / 50
        model.zero_grad()
        (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


@torch.inference_mode()
def evaluate(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, documents: list[Document], pairs: int
) -> float:
    """How often the text that answers a query scores above a random other one."""
    rows = RowSampler(documents, seed=1, training=False).draw(pairs, num_texts=2, max_words=100)
    labels = tokenizer.convert_tokens_to_ids(["no", "yes"])
    batches = [last_logits(model, tokenizer, rows[i : i + 20]) for i in range(0, pairs, 20)]
    answer, other = torch.cat(batches)[..., labels].diff(dim=-1).unbind(1)
    return (answer > other).float().mean().item()


def main() -> None:
    """Trains a model or takes the saved one, and prints its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the saved model")
    parser.add_argument("--pairs", type=int, default=2000, help="pairs to evaluate on")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same sums everywhere; matrices this small gain little from more
    training, held_out = collect_documents()
    if not args.evaluate:
        tokenizer = train_tokenizer(training, vocab_size=3072)
        model = build_model(tokenizer, args.seed)
        train(model, tokenizer, RowSampler(training, args.seed, training=True), args.steps)
        model.bfloat16().save_pretrained(args.output)
        (args.output / "model.safetensors").chmod(0o644)  # safetensors writes 0o600
        tokenizer.save_pretrained(args.output, save_jinja_files=False)
    tokenizer = Tokenizer.from_pretrained(args.output)
    model = Qwen3ForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    print(f"held-out pairwise accuracy: {evaluate(model, tokenizer, held_out, args.pairs):.4f}")


if __name__ == "__main__":
    main()
