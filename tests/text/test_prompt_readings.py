"""What a prompt's rank score is made of, prompts by a model's name, and by its chat template."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from cli_helpers import Cli
from helpers import PANDA, encode_whole, logits_one_by_one, random_classifier, random_qwen3
from packscore import (
    PROMPTS,
    InputError,
    MultiItemScorer,
    PromptSpec,
    UnsupportedModelError,
    patch_model,
    register_pipelines,
    shipped_model_path,
)
from packscore.integrations.pipeline import TASK
from packscore.text.named import MODELS, prompt_for
from tolerances import LOG_ODDS_FLOAT32

DOCUMENTS = ["A bear.", "Tea", "", "Shuffle list x in place."]
FRAME = PromptSpec(prefix="Q: {query}\nD:", item=" {item}", suffix="\nA:")
READINGS: dict[str, tuple[PromptSpec, Callable[[torch.Tensor], torch.Tensor]]] = {
    "a fifth of one logit": (
        replace(FRAME, labels=(617,), scale=1 / 5),
        lambda logits: torch.sigmoid(logits[:, 617] / 5),
    ),
    "one logit": (replace(FRAME, labels=(0,), scale=None), lambda logits: logits[:, 0]),
    "log-odds": (
        replace(FRAME, labels=(15, 16), scale=None),
        lambda logits: logits[:, 16] - logits[:, 15],
    ),
    "half of them": (
        replace(FRAME, labels=(15, 16), scale=0.5),
        lambda logits: torch.sigmoid((logits[:, 16] - logits[:, 15]) / 2),
    ),
}


def model_for(tokenizer: Any) -> Any:
    """A random model that has an embedding for every token."""
    model = random_qwen3()
    model.resize_token_embeddings(len(tokenizer))
    return model


@pytest.fixture(params=[*READINGS])
def reading(request: pytest.FixtureRequest) -> Any:
    return READINGS[request.param]


def test_rank_scores_are_what_the_prompt_says(reading: Any, tokenizer: Any) -> None:
    spec, read = reading
    model = model_for(tokenizer)
    texts = [f"Q: {PANDA}\nD: {document}\nA:" for document in DOCUMENTS]
    logits = logits_one_by_one(model, [], encode_whole(tokenizer, texts))
    expected = read(logits).numpy()
    scorer = MultiItemScorer(patch_model(model), tokenizer, prompt=spec)
    pairs = [(PANDA, document) for document in DOCUMENTS]
    np.testing.assert_allclose(scorer.predict(pairs), expected, atol=LOG_ODDS_FLOAT32)
    ranked = scorer.rank(PANDA, DOCUMENTS)
    assert [entry["corpus_id"] for entry in ranked] == np.argsort(-expected).tolist()
    found = [entry["score"] for entry in sorted(ranked, key=lambda entry: entry["corpus_id"])]
    np.testing.assert_allclose(found, expected, atol=LOG_ODDS_FLOAT32)
    # an activation takes the place of the prompt's own, scale and all
    columns = logits[:, list(spec.labels)]
    raw = columns[:, -1] if len(spec.labels) == 1 else columns[:, 1] - columns[:, 0]
    found = scorer.predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(found, raw.numpy(), atol=LOG_ODDS_FLOAT32)
    # and probabilities of labels stay what they are
    probabilities = logits.softmax(-1)[:, list(spec.labels)].numpy()
    np.testing.assert_allclose(scorer.score(PANDA, DOCUMENTS), probabilities, atol=1e-5)


def test_the_pipeline_gives_the_prompts_rank_scores(reading: Any, tokenizer: Any) -> None:
    spec, _ = reading
    model = patch_model(model_for(tokenizer))
    expected = MultiItemScorer(model, tokenizer, prompt=spec).predict(
        [(query, document) for query in (PANDA, "tea") for document in DOCUMENTS]
    )
    register_pipelines()
    try:
        pipe = pipeline(TASK, model=model, tokenizer=tokenizer, prompt=spec)
        requests = [{"query": query, "items": DOCUMENTS} for query in (PANDA, "tea")]
        found = [entry["score"] for one in pipe(requests, batch_size=2) for entry in one]
        np.testing.assert_allclose(found, expected, atol=LOG_ODDS_FLOAT32)
        chosen = pipe({**requests[0], "label_token_ids": [15, 16]})
        assert set(chosen[0]["scores"]) == {15, 16}
        assert sum(chosen[0]["scores"].values()) == pytest.approx(1)
    finally:
        del PIPELINE_REGISTRY.supported_tasks[TASK]


def test_the_command_line_ranks_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli = Cli(tmp_path)
    cli.write("in.jsonl", [{"query": PANDA, "items": DOCUMENTS}])
    parts = {"prefix": "Q: {query}\nD:", "item": " {item}", "labels": [617], "scale": None}
    (tmp_path / "one.json").write_text(json.dumps(parts))
    model = ("-m", str(shipped_model_path()), "--device", "cpu", "--dtype", "float32")
    assert cli("rank", "in.jsonl", "-o", "a.jsonl", *model, "--prompt", "one.json").code == 0
    (record,) = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    spec = PromptSpec(**{**parts, "labels": (617,)})
    scorer = MultiItemScorer.from_pretrained(
        shipped_model_path(), device="cpu", dtype=torch.float32, prompt=spec
    )
    expected = scorer.rank(PANDA, DOCUMENTS)
    assert [entry["corpus_id"] for entry in record["ranking"]] == [
        entry["corpus_id"] for entry in expected
    ]
    assert record["ranking"][0]["score"] == pytest.approx(expected[0]["score"], abs=1e-4)
    auto = cli("rank", "in.jsonl", "-o", "b.jsonl", *model, "--prompt", "auto")
    assert "--prompt='auto' knows no prompt for" in auto.err


def test_labels_are_as_many_as_the_prompt_reads(tokenizer: Any) -> None:
    model = patch_model(model_for(tokenizer))
    one = MultiItemScorer(model, tokenizer, prompt=replace(FRAME, labels=(5,)), labels=["a", "b"])
    with pytest.raises(InputError, match="read one with this prompt, and this scorer has 2"):
        one.rank(PANDA, DOCUMENTS)
    two = MultiItemScorer(model, tokenizer, prompt=replace(FRAME, labels=(5, 6)), labels=["a"])
    with pytest.raises(InputError, match=r"compare two, \(negative, positive\), .* has 1"):
        two.rank(PANDA, DOCUMENTS)
    long = MultiItemScorer(model, tokenizer, prompt=replace(FRAME, labels=("yes<|im_end|>",)))
    with pytest.raises(InputError, match="the logit of one token with this prompt"):
        long.rank(PANDA, DOCUMENTS)
    assert len(long.score(PANDA, DOCUMENTS)) == len(DOCUMENTS)


def test_a_classifier_keeps_its_own_reading(tokenizer: Any) -> None:
    model = patch_model(random_classifier(num_labels=1, vocab_size=len(tokenizer)))
    scores = [
        MultiItemScorer(model, tokenizer, prompt=replace(FRAME, scale=scale)).predict([("a", "b")])
        for scale in (1.0, 0.2, None)
    ]
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale=0.0 must be a positive number, or None"),
        ({"scale": float("inf")}, "scale=inf must be a positive number"),
        ({"strips": "all"}, "strips='all' must be one of '', 'blanks', 'item newlines'"),
        ({"labels": ("a", 1)}, r"labels=\('a', 1\) must be texts, or token ids, and not both"),
        (
            {"instruction_frame": "x"},
            r"instruction_frame='x' must use \{instruction\} exactly once",
        ),
    ],
)
def test_values_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(FRAME, **options)


def test_what_files_keep_of_a_prompt_tells_newer_parts_where_they_say_something() -> None:
    assert FRAME.spelled == (
        "PromptSpec(prefix='Q: {query}\\nD:', item=' {item}', suffix='\\nA:', instruction='', "
        "labels=(), max_tokens=None, joins_ids=False, adds_special_tokens=True)"
    )
    specs = [FRAME, *(replace(FRAME, **x) for x in ({"scale": None}, {"strips": "blanks"}))]
    assert len({spec.spelled for spec in [*specs, *PROMPTS.values()]}) == 3 + len(PROMPTS)


# names on the hub, folders of that name, and what is neither
KNOWN = {
    **MODELS,
    "/models/Qwen3-Reranker-0.6B/": "qwen3-reranker",
    "./zerank-2": "zerank-2",
    "mxbai-rerank-base-v2": "mxbai-rerank-v2",
    "C:\\models\\Qwen3Guard-Gen-4B": "qwen3guard",
}
UNKNOWN = ["", "gpt2", "/tmp/checkpoint-500", "me/Qwen3-Reranker-0.6B", "Qwen/Qwen3-0.6B"]


def test_auto_takes_the_prompt_of_a_models_name() -> None:
    for name, prompt in KNOWN.items():
        assert prompt_for("auto", name) == prompt, name
    assert prompt_for("auto", None, "/adapters/mine", "Qwen/Qwen3-Reranker-4B") == "qwen3-reranker"
    assert prompt_for("yes-no", "Qwen/Qwen3-Reranker-4B") == "yes-no"
    assert prompt_for(None) is None


@pytest.mark.parametrize("name", UNKNOWN)
def test_auto_refuses_what_it_does_not_know(name: str) -> None:
    with pytest.raises(InputError, match=r"prompt='auto' knows no prompt for .*; it knows Qw"):
        prompt_for("auto", name, None)


def test_auto_folders_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "zerank-2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert prompt_for("auto", "models/zerank-2") == "zerank-2"


def test_a_scorer_takes_it_from_its_model(tokenizer: Any) -> None:
    model = patch_model(model_for(tokenizer))
    model.config.name_or_path = "Qwen/Qwen3-Reranker-0.6B"
    auto = MultiItemScorer(model, tokenizer, prompt="auto")
    named = MultiItemScorer(model, tokenizer, prompt="qwen3-reranker")
    assert "prompt='qwen3-reranker'" in repr(auto)
    assert np.array_equal(auto.encode(PANDA, ["a"]).prefix, named.encode(PANDA, ["a"]).prefix)
    model.config.name_or_path = "mine"
    with pytest.raises(InputError, match="knows no prompt for models named 'mine'"):
        MultiItemScorer(model, None, prompt="auto")


def test_auto_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packscore.scoring.load_model", lambda *_, **__: pytest.fail("it loads"))
    with pytest.raises(InputError, match="prompt='auto' knows no prompt for models named"):
        MultiItemScorer.from_pretrained(shipped_model_path(), prompt="auto")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content CHANGE }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def with_template(tokenizer: Any, change: str = "") -> Any:
    found = copy.deepcopy(tokenizer)
    found.chat_template = CHATML.replace("CHANGE", change)
    return found


def rendered(tokenizer: Any, spec: PromptSpec, documents: list[str], query: str) -> list[str]:
    scorer = MultiItemScorer(
        patch_model(model_for(tokenizer)), tokenizer, prompt=spec, labels=["a", "b"]
    )
    request = scorer.encode(query, documents)
    return [tokenizer.decode([*request.prefix, *item]) for item in request.items]


@pytest.mark.parametrize(
    ("change", "strips"),
    [("", ""), ("| trim", "blanks")],
    ids=["as it is", "stripped"],
)
def test_a_spec_of_a_chat_template_has_its_text(tokenizer: Any, change: str, strips: str) -> None:
    own = with_template(tokenizer, change)
    spec = PromptSpec.from_chat_template(
        own, system="{instruction} {{x}}", user="{query}", assistant="{item}", instruction="Rate"
    )
    assert spec.strips == strips
    documents, query = ["a", " b\n", "\n\n c", ""], " why? "
    expected = [
        own.apply_chat_template(
            [
                {"role": "system", "content": "Rate {x}"},
                {"role": "user", "content": query},
                {"role": "assistant", "content": document},
            ],
            tokenize=False,
        )
        for document in documents
    ]
    assert rendered(own, spec, documents, query) == expected


def test_a_reply_without_the_newlines_before_it(tokenizer: Any) -> None:
    """As Qwen3's own template treats an assistant's last turn, which reward models score."""
    own = with_template(tokenizer, "if m.role == 'user' else m.content.lstrip('\\n')")
    spec = PromptSpec.from_chat_template(own, user="{query}", assistant="{item}")
    assert spec.strips == "item newlines"
    (text,) = rendered(own, spec, ["\n\n a\n"], "\nwhy?")
    assert text == ("<|im_start|>user\n\nwhy?<|im_end|>\n<|im_start|>assistant\n a\n<|im_end|>\n")


def test_a_chat_template_opens_the_answer(tokenizer: Any) -> None:
    own = with_template(tokenizer)
    spec = PromptSpec.from_chat_template(
        own, system="{query}", user="Text: {item}", answer="Safety:", labels=(" Safe", " Unsafe")
    )
    assert spec == PromptSpec(
        prefix="<|im_start|>system\n{query}<|im_end|>\n<|im_start|>user\nText:",
        item=" {item}",
        suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nSafety:",
        labels=(" Safe", " Unsafe"),
        adds_special_tokens=False,
    )
    thinks = PromptSpec.from_chat_template(own, user="{item}", enable_thinking=True)
    assert thinks.suffix == "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ({"user": "{query}"}, r"use the fields \['query'\]; they must use \{item\}"),
        ({"user": "{item} {item}"}, "and each only once"),
        ({"user": "{item}", "system": "{text}"}, r"system='\{text\}' uses \{text\}"),
    ],
)
def test_messages_that_cannot_be_are_refused(
    tokenizer: Any, messages: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        PromptSpec.from_chat_template(with_template(tokenizer), **messages)


def test_the_shipped_chat_template_is_the_reranker_prompt(tokenizer: Any) -> None:
    def render(**texts: str) -> Any:
        roles = {"query": texts["query"], "document": texts["item"]}
        messages = [{"role": role, "content": text} for role, text in roles.items()]
        return tokenizer.apply_chat_template(messages, tokenize=False)

    expected = PROMPTS["qwen3-reranker"]
    spec = PromptSpec.from_render(render)
    assert spec.prefix == expected.prefix.replace("{instruction}", expected.instruction)
    assert (spec.item, spec.suffix) == (expected.item, expected.suffix)


def test_a_render_becomes_a_spec_cut_before_the_blank() -> None:
    spec = PromptSpec.from_render(lambda query, item: f"{{x}} {query}\nDocument:  {item}\n}}")
    expected = PromptSpec(
        prefix="{{x}} {query}\nDocument:",
        item="  {item}",
        suffix="\n}}",
        adds_special_tokens=False,
    )
    assert spec == expected
    behind = PromptSpec.from_render(lambda query, item: f"{item} {query}?")
    assert behind == PromptSpec("", "{item}", " {query}?", adds_special_tokens=False)


RENDERS: dict[str, tuple[Callable[..., str], str]] = {
    "drops": (lambda query, item: query, "puts the item in 0 times"),
    "repeats": (lambda query, item: query + item + query, "puts the query in 2 times"),
    "strips one": (lambda query, item: f"{query} {item.strip()}", "changes what it frames"),
    "escapes": (lambda query, item: query + item.replace("<", "&lt;"), "changes what it frames"),
}


@pytest.mark.parametrize(("render", "text"), RENDERS.values(), ids=RENDERS.keys())
def test_a_render_that_is_no_frame_is_refused(render: Callable[..., str], text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=text):
        PromptSpec.from_render(render)
