"""The Hugging Face pipeline "multi-item-scoring": requests of one query and many items."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import Pipeline

from packscore.errors import InputError, InputTypeError, ScoringError
from packscore.inputs import Text, as_list, check_choice, check_count, check_options, short
from packscore.integrations.loading import kept_scorer
from packscore.integrations.pipeline_outputs import (
    Label,
    Outcome,
    all_of,
    entry_of,
    gaps_in,
    labelled,
    numbers_first,
    until_failure,
)
from packscore.interfaces import (
    PIPELINE_BATCH,
    PIPELINE_OPTIONS,
    PIPELINE_RECORD,
    PIPELINE_WORKERS,
    PIPELINES,
    check_pipelines,
)
from packscore.model.family import base_model, class_count
from packscore.patching import patch_model
from packscore.scoring import MultiItemScorer
from packscore.text.named import prompt_for, resolve_prompt
from packscore.text.prompts import PromptSpec

TASK = "multi-item-scoring"
# What becomes an option of the scorer, and what acts on the labels and the entries of one call.
SCORER_OPTIONS = (
    *("prompt", "instruction", "mask_impl", "max_tokens", "on_long", "split_special_tokens"),
    *("prefix_cache_bytes", "on_non_finite"),
)
LABEL_OPTIONS = ("labels", "label_token_ids")
OUTPUT_OPTIONS = ("apply_softmax", "top_k", "return_items", "show_progress_bar")
OPTIONS = (*SCORER_OPTIONS, *LABEL_OPTIONS, *OUTPUT_OPTIONS)
ITEM_KEYS = {"query", "items", *LABEL_OPTIONS}
SEQUENCE_KEYS = {"sequence", "candidate_labels"}


@dataclass(frozen=True)
class Request:
    """One request as it came, checked for its keys."""

    query: Text
    items: list[Any]
    labels: Mapping[str, Sequence[Any]] | None = None  # {"labels" or "label_token_ids": values}
    is_sequence: bool = False  # {"sequence", "candidate_labels"} with one sequence
    are_sequences: bool = False  # or with a list of them


@dataclass(frozen=True)
class Scored:
    """A request and P(label) for each of its items; no label names where two mean no and yes."""

    request: Request
    scores: list[list[float]]
    names: list[Label] | None


class MultiItemScoringPipeline(Pipeline):
    """Scores of many items against one query, as a Hugging Face pipeline.

    The model is patched when the pipeline is made (`patch_model`, in place and reversible); a model
    that is patched already is taken as it is.

    Args:
      model: a causal model that packscore supports, or a sequence classifier on one.
      tokenizer: its tokenizer; without one, requests hold token ids.
      batch_size: requests scored in one launch. It changes no score.
      **kwargs: `prompt`, `instruction`, `mask_impl`, `max_tokens`, `on_long`,
        `split_special_tokens`, `prefix_cache_bytes` and `on_non_finite` of `MultiItemScorer`, and
        any option of a call, as its default.

    Raises:
      InputError, InputTypeError: an option is unknown or has a value that cannot be.
      UnsupportedModelError: the model cannot be scored exactly.
    """

    # Any: transformers declares these flags as None
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_pipelines()
        super().__init__(*args, **kwargs)
        self._scorers: dict[str, MultiItemScorer] = {}
        self._defaults: dict[str, Any] = dict(getattr(self, PIPELINE_OPTIONS.name))
        if self._defaults.get("mask_impl") != "dense":
            patch_model(self.model)
        self._scorer(self._defaults)

    # transformers logs positional arguments and ignores them; here they are an error
    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Score one request or many.

        Args:
          inputs: {"query": text, "items": [text, ...]}, with its own "labels" or "label_token_ids"
            if it has any; or {"sequence": text or [text, ...], "candidate_labels": [...]} with a
            prompt that has no query; or a list, a generator or a data set of such requests.
          **kwargs: labels: texts; None takes the prompt's.
            label_token_ids: labels as token ids instead, one each or one list each.
            apply_softmax: softmax over the labels (default); False: over the whole vocabulary.
            top_k: the best so many, best first; None gives all, in the order of the items.
            return_items: put each item into its entry, as "item".
            batch_size: requests scored in one launch.
            show_progress_bar: show one, counting requests.
            prompt, instruction, ...: as in the constructor, for this call.

        Returns:
          For a request [{"index": i, "score": P(yes)}, ...] where no labels were passed and the
          prompt has two (no, yes), or one, whose score is that of `rank`, or a classifier two
          classes or one; else [{"index": i, "label":
          the most probable, "score": its probability, "scores": {label: probability, ...}}, ...].
          For a sequence {"sequence", "labels", "scores"}, most probable label first. For a list, a
          list of these; for a generator or a data set, an iterator over them.

        Raises:
          InputError, InputTypeError: an option is unknown or a request cannot be scored; of a list,
            every request is looked at before the model runs.
        """
        workers = kwargs.pop("num_workers", None) or getattr(self, PIPELINE_WORKERS.name)
        if workers:
            raise InputError(f"num_workers={workers} has no use here: requests are texts; drop it")
        batch_size = kwargs.pop("batch_size", None)
        batch_size = getattr(self, PIPELINE_BATCH.name) if batch_size is None else batch_size
        check_count("batch_size", batch_size)
        _, options, _ = self._sanitize_parameters(**kwargs)
        options = self._merge(options)
        if isinstance(inputs, Mapping):
            ((found, failure),) = self._run([self.preprocess(inputs)], 1, options, total=1)
            if failure is not None:
                raise failure
            return found
        if isinstance(inputs, list | tuple):
            requests = [self.preprocess(x, name=f"inputs[{i}]") for i, x in enumerate(inputs)]
            return all_of(self._run(requests, batch_size or 1, options, total=len(requests)))
        lazy = (
            self.preprocess(x, name=f"inputs[{i}]") for i, x in enumerate(_each_request(inputs))
        )
        total = len(inputs) if hasattr(inputs, "__len__") else None
        return until_failure(self._run(lazy, batch_size or 1, options, total=total))

    def _run(
        self, requests: Iterable[Request], batch_size: int, options: Any, *, total: int | None
    ) -> Iterator[Outcome]:
        """The result of each request, and what is wrong with it."""
        hidden = not options.get("show_progress_bar", False)
        remaining = iter(requests)
        with tqdm(total=total, unit="request", disable=hidden) as bar:
            while batch := list(itertools.islice(remaining, batch_size)):
                for scored in self._forward({"requests": batch}, **options)["scored"]:
                    if isinstance(scored, ScoringError):
                        yield None, scored
                        continue
                    found = self.postprocess(scored, **options)
                    is_told = options.get("on_non_finite") == "report"
                    yield found, None if is_told else gaps_in(scored.scores, found)
                bar.update(len(batch))

    def _merge(self, options: dict[str, Any]) -> dict[str, Any]:
        """A call's options over the pipeline's; its labels replace the other kind of labels too."""
        kept = dict(self._defaults)
        if any(name in options for name in LABEL_OPTIONS):
            kept = {name: value for name, value in kept.items() if name not in LABEL_OPTIONS}
        return {**kept, **options}

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
        for name in kwargs:
            if name not in OPTIONS:
                raise InputTypeError(
                    f"{name}={short(kwargs[name])} is no option of {TASK!r}; "
                    f"it has {', '.join((*OPTIONS, 'batch_size'))}"
                )
        check_options(kwargs)
        given = {
            name: x for name, x in kwargs.items() if name not in LABEL_OPTIONS or x is not None
        }
        return {}, given, {}

    def preprocess(  # type: ignore[override]  # one more option: what the caller calls it
        self, input_: Any, *, name: str = "inputs"
    ) -> Any:
        """A `Request`, its keys checked.

        Raises:
          InputTypeError, InputError: it is no request, or a key is unknown or missing.
        """
        if not isinstance(input_, Mapping):
            raise InputTypeError(
                f"{name}={short(input_)} must be a request like {{'query': ..., 'items': [...]}}"
            )
        keys = set(input_)
        if keys & SEQUENCE_KEYS:
            _check_keys(name, keys, SEQUENCE_KEYS, required=SEQUENCE_KEYS)
            return _sequence_request(name, input_["sequence"], input_["candidate_labels"])
        _check_keys(name, keys, ITEM_KEYS, required={"query", "items"})
        labels = {key: input_[key] for key in LABEL_OPTIONS if input_.get(key) is not None}
        items = as_list(f"{name}['items']", input_["items"], may_be_empty=True)
        return Request(input_["query"], items, labels or None)

    def _forward(self, input_tensors: dict[str, Any], **options: Any) -> Any:
        scorer = self._scorer(options)
        spec = self._spec(options)
        defaults = {name: options[name] for name in LABEL_OPTIONS if name in options}
        own = self._classes() or spec.labels
        if not defaults and len(own) > 2:
            defaults = {"labels": own}
        requests: list[Request] = input_tensors["requests"]
        for request in requests:
            sequence = request.is_sequence or request.are_sequences
            if sequence and not spec.joins_ids and "query" in spec.shared_fields:
                raise InputError(
                    f"prompt={short(options.get('prompt'))} asks about a query, and a request with "
                    "candidate_labels has none; pass prompt=PromptSpec(...) without {query}"
                )
        labels = [dict(request.labels or defaults) for request in requests]
        softmax = bool(options.get("apply_softmax", True))
        # a prompt that ranks in a way of its own does so here, where its own labels are asked for
        ranks = softmax and not self._classes() and (spec.num_ranked, spec.scale) != (2, 1.0)
        scores = _score_requests(scorer, requests, labels, apply_softmax=softmax, ranks=ranks)
        return {
            "scored": [
                rows
                if isinstance(rows, ScoringError)
                else Scored(request, rows, _label_names(label))
                for request, rows, label in zip(requests, scores, labels, strict=True)
            ]
        }

    def postprocess(self, model_outputs: Any, **options: Any) -> Any:
        """The entries of one request, as `__call__` returns them."""
        request, top_k = model_outputs.request, options.get("top_k")
        if request.is_sequence or request.are_sequences:
            found = [
                labelled(text, model_outputs.names or [], row, top_k)
                for text, row in zip(request.items, model_outputs.scores, strict=True)
            ]
            return found if request.are_sequences else found[0]
        entries = [
            entry_of(i, row, model_outputs.names) for i, row in enumerate(model_outputs.scores)
        ]
        if options.get("return_items", False):
            for entry, item in zip(entries, request.items, strict=True):
                entry["item"] = item
        if top_k is None:
            return entries
        return sorted(entries, key=lambda entry: numbers_first(entry["score"]))[:top_k]

    def _spec(self, options: dict[str, Any]) -> PromptSpec:
        """The prompt that options name."""
        names = self.model.config.name_or_path, getattr(self.tokenizer, "name_or_path", None)
        return resolve_prompt(prompt_for(options.get("prompt"), *names))

    def _classes(self) -> tuple[str, ...]:
        """The classes of a sequence classifier, which take the place of a prompt's labels."""
        model = base_model(self.model)
        config: Any = model.config
        return tuple(config.id2label[i] for i in range(class_count(model)))

    def _scorer(self, options: dict[str, Any]) -> MultiItemScorer:
        """The scorer of a prompt and its options, made once."""
        check_choice("on_non_finite", options.get("on_non_finite", "raise"), ("raise", "report"))
        own = {name: options[name] for name in SCORER_OPTIONS if name in options}
        own["on_non_finite"] = "report"  # `_run` says which request it was
        spelled = {"prompt": self._spec(own).spelled}
        key = repr(sorted({**own, **spelled}.items()))
        return kept_scorer(
            self._scorers, key, lambda: MultiItemScorer(self.model, self.tokenizer, **own)
        )


def _score_requests(
    scorer: MultiItemScorer,
    requests: list[Request],
    labels: list[dict[str, Any]],
    *,
    apply_softmax: bool,
    ranks: bool,
) -> list[list[list[float]] | ScoringError]:
    """The one place where a launch meets the scorer; requests of the same labels go at once.

    Those without labels of their own get rank scores where the prompt `ranks` in its own way.
    """
    scores: list[list[list[float]] | ScoringError] = [[] for _ in requests]
    groups: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(repr(label), []).append(i)
    for group in groups.values():
        pairs = [(requests[i].query, requests[i].items) for i in group]
        if ranks and not labels[group[0]]:
            for i, rows in zip(group, _rank_scores(scorer, pairs), strict=True):
                scores[i] = rows
            continue
        options = {**labels[group[0]], "apply_softmax": apply_softmax}
        try:
            found: list[Any] = scorer.score_many(pairs, **options)
        except ScoringError as failure:
            found = [failure if rows is None else rows for rows in failure.scores]
        for i, rows in zip(group, found, strict=True):
            scores[i] = rows
    return scores


def _rank_scores(
    scorer: MultiItemScorer, requests: list[tuple[Text, list[Any]]]
) -> list[list[list[float]] | ScoringError]:
    """[[score] for each item] of every request, or the error that it met."""
    pairs = [(query, item) for query, items in requests for item in items]
    try:
        found = iter(scorer.predict(pairs).tolist())
    except ScoringError as failure:
        if len(requests) == 1:
            return [failure]
        return [one for request in requests for one in _rank_scores(scorer, [request])]
    return [[[next(found)] for _ in items] for _, items in requests]


def _label_names(labels: dict[str, Any]) -> list[Label] | None:
    for values in labels.values():
        # a label of several ids is a tuple: it becomes a key
        return [tuple(name) if isinstance(name, list) else name for name in values]
    return None


def _sequence_request(name: str, sequence: Any, candidate_labels: Any) -> Request:
    if isinstance(candidate_labels, str):
        # as "zero-shot-classification" reads them
        candidate_labels = [label.strip() for label in candidate_labels.split(",")]
    labels = {"labels": as_list(f"{name}['candidate_labels']", candidate_labels)}
    if isinstance(sequence, str):
        return Request("", [sequence], labels, is_sequence=True)
    texts = as_list(f"{name}['sequence']", sequence, may_be_empty=True)
    return Request("", texts, labels, are_sequences=True)


def _each_request(inputs: Any) -> Iterable[Any]:
    """The requests of a generator or a data set, which may have no iterator of its own.

    Raises:
      InputTypeError: it is neither.
    """
    if isinstance(inputs, Iterable) and not isinstance(inputs, str | bytes):
        return inputs
    if hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__") and not np.isscalar(inputs):
        return (inputs[i] for i in range(len(inputs)))
    raise InputTypeError(
        f"inputs={short(inputs)} must be a request like {{'query': ..., 'items': [...]}}, "
        "or a list, generator or data set of requests"
    )


def _check_keys(name: str, keys: set[Any], known: set[str], required: set[str]) -> None:
    unknown, missing = sorted(map(str, keys - known)), sorted(required - keys)
    if unknown or missing:
        problem = f"has unknown keys {unknown}" if unknown else f"lacks {missing}"
        may = sorted(known - required)
        raise InputError(
            f"{name} {problem}; a request has {sorted(required)}"
            + (f" and may have {may}" if may else " and nothing else")
        )


def register_pipelines() -> None:
    """Make `transformers.pipeline("multi-item-scoring", ...)` known; a second call does nothing."""
    check_pipelines()
    registry = PIPELINES()
    known = registry.supported_tasks.get(TASK)
    if known is not None and known["impl"] is MultiItemScoringPipeline:
        return
    # no class of model is named: transformers then takes the one that the checkpoint names, where
    # an auto class would give a classifier's checkpoint a language-model head
    registry.register_pipeline(TASK, MultiItemScoringPipeline, type="text")
    # or `save_pretrained` would copy this file into the checkpoint as remote code
    delattr(MultiItemScoringPipeline, PIPELINE_RECORD.name)
