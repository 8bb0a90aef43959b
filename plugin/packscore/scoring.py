"""Score many items against one query: pack, run the model once, read the labels."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast, overload

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from packscore.batcher.batcher import MAX_REQUESTS, STARTING, WINDOW_SECONDS, Batcher
from packscore.calls import program_of
from packscore.core import Activation, Scores, ScoringCore, core_of
from packscore.decisions.answers import Answer, Decision
from packscore.encoded import EncodedRequest
from packscore.errors import InputError, ScoringError
from packscore.flows.page_pool import PREFIX_CACHE_BYTES
from packscore.flows.planner import Explanation
from packscore.flows.reads import LabelRead
from packscore.inputs import Text, as_iterator, as_list, as_pairs, checked
from packscore.loading import (
    load_model,
    load_stored,
    load_tokenizer,
    mesh_place_of,
    names_of,
    place_of,
)
from packscore.model.family import model_told
from packscore.patching import patch_model
from packscore.prefixes import Prefix
from packscore.reading.decider import Decider, Questions
from packscore.reading.prepared import Prepared
from packscore.reading.readouts import Readout, ScoreRequest
from packscore.reading.scores import prepare_rank, prepare_score, reading_of, score_requests
from packscore.reading.streams import decide_stream, stream
from packscore.results import (
    Flow,
    MaskChoice,
    NonFiniteChoice,
    RankedDocument,
    ScoreResult,
    Usage,
    merge_usages,
)
from packscore.telling import cut, telling
from packscore.text.encoding import ArgumentNames, group_by_query
from packscore.text.labels import LabelIds, Labels
from packscore.text.named import AUTO, prompt_for, resolve_prompt
from packscore.text.prompts import PromptSpec

if TYPE_CHECKING:
    from packscore.programs.mesh.choice import MeshChoice


class MultiItemScorer:
    """Scores of many items against one query, equal to scoring each item alone.

    `score(query, items)[k]` is what the model gives for `query ids + item k ids` by itself. The
    query is computed once; every item sees the query and itself only.

    Args:
      model: a causal Hugging Face model, or a sequence classifier on one, in eval mode, after
        `patch_model(model)`.
      tokenizer: its tokenizer, which is copied and never changed; without one, pass token ids.
      prompt: a name of `PROMPTS`, such as "qwen3-reranker", or a `PromptSpec`; "auto" is the one
        that a model known by its name was trained with; None is "plain".
      mask_impl: "segment" (no mask at all), "dense" (a mask of num_tokens x num_tokens: through the
        model's own attention, also where it is not patched, or in its programs), or "auto": segment
        wherever it is exact; dense, and a warning that says why, where only a mask can be (a
        sliding window that requests may reach, soft-capping, attention sinks).
      instruction: what `{instruction}` of the prompt becomes; None takes the prompt's default.
      labels: default label texts; None takes the prompt's. Of a sequence classifier: names of
        classes, and None takes all.
      label_token_ids: default labels as token ids instead, one each or one list each.
      max_tokens: budget of query and one item; None takes the prompt's or the model's own.
      on_long: "truncate" cuts the end of items over the budget and reports them, "error" raises.
      split_special_tokens: encode special tokens in texts, and others that look like markup, as
        ordinary text. None does so where a prompt frames the texts, so that a document can forge
        nothing of it, and not where the caller supplies the whole text ("plain"), which is encoded
        as the tokenizer would.
      prefix_cache_bytes: keys and values of queries that may stay on the device, so that the next
        call with the same query, or the same start of one, need not compute it; the least recently
        used go first. 0 keeps none.
      on_non_finite: where a label's logit is NaN or infinite, "raise" keeps the other scores in a
        `NonFiniteScoreError`; "report" returns NaN, ranked behind all numbers, and lists the
        items in the usage.

    Raises:
      UnsupportedModelError: the model cannot be scored exactly, or not with this `mask_impl`, or
        has no trained head.
      NotPatchedError: the model is not patched, and no dense mask serves it.
      InputError, InputTypeError: an option does not exist or does not fit the others.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        prompt: str | PromptSpec | None = None,
        mask_impl: MaskChoice = "auto",
        instruction: str | None = None,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        max_tokens: int | None = None,
        on_long: Literal["truncate", "error"] = "truncate",
        split_special_tokens: bool | None = None,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        on_non_finite: NonFiniteChoice = "raise",
    ) -> None:
        if prompt == AUTO:
            # Any: only models of transformers have a configuration, which `core_of` checks
            config: Any = getattr(model, "config", None)
            own = getattr(tokenizer, "name_or_path", None)
            prompt = prompt_for(prompt, getattr(config, "name_or_path", None), own)
        self._tokenizer, self._prompt = tokenizer, prompt
        self._decider: Decider | None = None
        self._batcher: Batcher | None = None
        self._core = core_of(
            model,
            tokenizer,
            prompt=prompt,
            mask_impl=mask_impl,
            instruction=instruction,
            labels=labels,
            label_token_ids=label_token_ids,
            max_tokens=max_tokens,
            on_long=on_long,
            split_special_tokens=split_special_tokens,
            prefix_cache_bytes=prefix_cache_bytes,
            on_non_finite=on_non_finite,
        )

    @telling
    def __repr__(self) -> str:
        # nothing here makes an engine or reads a weight
        program = program_of(self._core.base)
        runs = "torch" if program is None else f"programs on {program.place}"
        if program is None and self.num_copies > 1:
            runs += f", {self.num_copies} copies"
        prompt = cut(self._prompt or "plain")
        mask = f"mask_impl={self.mask_impl!r}"
        return f"{model_told(self._core.base)}, in {runs}, prompt={prompt}, {mask}"

    @classmethod
    @checked
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        mesh: MeshChoice = None,
        dtype: str | torch.dtype = "auto",
        prompt: str | PromptSpec | None = None,
        mask_impl: MaskChoice = "auto",
        instruction: str | None = None,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        max_tokens: int | None = None,
        on_long: Literal["truncate", "error"] = "truncate",
        split_special_tokens: bool | None = None,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        on_non_finite: NonFiniteChoice = "raise",
        compile_cache: str | Path | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Self:
        """Load a model and its tokenizer, patch it, and make its scorer.

        The model is a causal one, or a sequence classifier where the checkpoint's configuration
        says so, in eval mode. A folder is read without a look at the network.

        Args:
          name_or_path: name on the hub, or a folder, of a model or of an adapter.
          device: "cpu", "cuda", "cuda:1", "mps", or a `torch.device`: there, in torch. "tpu", and
            "jax" (the device jax prefers): compiled programs over weights on the CPU. None, or
            "auto": CUDA where torch has it, else a TPU, else MPS, else the CPU. "meta" loads no
            weights, for a scorer that encodes and counts tokens.
          mesh: the chips of "tpu" or "jax" that programs run on, as in `patch_model`. Each reads
            its part of the weights from the files (safetensors, not quantised), and nothing ever
            has all of them: a model need fit neither a chip nor the host's memory. torch then has
            no weights, so that whatever would call, change, move, copy, save or unpatch the model
            is an `UnsupportedModelError`. None: one chip, and the weights in the host's memory.
          dtype: of the weights, as transformers takes it: "auto" (the checkpoint's), a dtype of
            torch, or its name.
          prompt, mask_impl, instruction, labels, label_token_ids, max_tokens, on_long: as in the
            constructor.
          split_special_tokens, prefix_cache_bytes, on_non_finite: as in the constructor.
          compile_cache: as in `patch_model`; for "tpu" and "jax".
          revision: branch, tag or commit of a name on the hub.
          cache_dir: folder of what the hub sends; None is Hugging Face's own.
          local_files_only: ask the hub for nothing.
          trust_remote_code: run code that the checkpoint brings along.
          model_kwargs: more arguments of the model's `from_pretrained`, such as
            `attn_implementation` or `device_map` (then without `device`).

        Raises:
          LoadError: there is no such checkpoint, it cannot be read, lacks weights (a head among
            them), or has no tokenizer; or a `mesh` cannot take it as it is.
          InputError, InputTypeError: an option does not exist, there is no such device or mesh, or
            as the constructor raises it.
          UnsupportedModelError: as the constructor raises it.
        """
        if prompt != AUTO:
            resolve_prompt(prompt)
        has_map = "device_map" in (model_kwargs or {})
        if has_map and device is not None:
            raise InputError(f"{device=} and a device_map in model_kwargs; pass one of them")
        on_mesh = mesh is not None
        place = mesh_place_of(device) if on_mesh else place_of("cpu" if has_map else device)
        hub: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        tokenizer = load_tokenizer(name_or_path, **hub)
        prompt = prompt_for(prompt, *names_of(name_or_path, **hub))
        load = load_stored if on_mesh else functools.partial(load_model, device=place.torch)
        model = load(name_or_path, dtype=dtype, model_kwargs=model_kwargs, **hub)
        return cls(
            patch_model(model, device=place.programs, mesh=mesh, compile_cache=compile_cache),
            tokenizer,
            prompt=prompt,
            mask_impl=mask_impl,
            instruction=instruction,
            labels=labels,
            label_token_ids=label_token_ids,
            max_tokens=max_tokens,
            on_long=on_long,
            split_special_tokens=split_special_tokens,
            prefix_cache_bytes=prefix_cache_bytes,
            on_non_finite=on_non_finite,
        )

    @property
    def model(self) -> nn.Module:
        """The model, as it was given."""
        return self._core.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, as it was given."""
        return self._tokenizer

    @property
    def mask_impl(self) -> Literal["segment", "dense"]:
        """How items are kept apart."""
        return self._core.mask_impl

    @property
    def num_copies(self) -> int:
        """Copies of the model that launches run on, as `patch_model` made them."""
        return self._core.num_copies

    @property
    def prefix_cache_bytes(self) -> int:
        """What keys and values of queries may take on the device."""
        return self._core.prefix_cache_bytes

    @overload
    def score(
        self,
        query: Text,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        item_labels: Sequence[Sequence[str]] | None = None,
        item_label_token_ids: Sequence[LabelIds] | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        item_first: bool = False,
        flow: Flow | None = None,
        return_usage: Literal[False] = False,
    ) -> list[list[float]]: ...

    @overload
    def score(
        self,
        query: Text,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        item_labels: Sequence[Sequence[str]] | None = None,
        item_label_token_ids: Sequence[LabelIds] | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        item_first: bool = False,
        flow: Flow | None = None,
        return_usage: Literal[True],
    ) -> ScoreResult[list[list[float]]]: ...

    @checked
    def score(
        self,
        query: Text,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        item_labels: Sequence[Sequence[str]] | None = None,
        item_label_token_ids: Sequence[LabelIds] | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        item_first: bool = False,
        flow: Flow | None = None,
        return_usage: bool = False,
    ) -> list[list[float]] | ScoreResult[list[list[float]]]:
        """Probability of every label at the end of every item.

        Args:
          query: text, or token ids (with the prompt "plain").
          items: texts or token ids, one kind only; an empty item is scored at the query's end.
            No items give no scores.
          labels: label texts; None takes the scorer's. P of a label of several tokens is the
            product of theirs, each behind the item and the tokens before it.
          label_token_ids: labels as token ids instead, one each or one list each.
          item_labels: labels that differ from item to item: for each what `labels` is for all.
          item_label_token_ids: the same as token ids: for each what `label_token_ids` is for all.
          apply_softmax: softmax over the labels alone; False: over the whole vocabulary, or over
            all classes of a classifier. The only class of a classifier gets a sigmoid.
          readout: `Label()`, `Content(...)` or `Hidden(...)`, see there; None is `Label()`.
          item_first: score `item + query` instead; then nothing is shared between items.
          flow: "packed", "extend", "chunked" or "plain", which all give the same scores; None is
            the cheapest, see `explain`. "packed" and "plain" by name neither read nor keep pages,
            and so give the same bits whatever was scored before.
          return_usage: return a `ScoreResult` with the tokens it took.

        Returns:
          [[P(label) for each label] for each item], in the order given; under `Hidden` what its
          head gives.

        Raises:
          InputError, InputTypeError: an argument cannot be scored; raised before the model runs.
          NotPatchedError: the model was unpatched since.
          NonFiniteScoreError: logits are NaN or infinite, and `on_non_finite` is "raise".
        """
        self._core.check_ready()
        prepared = prepare_score(
            self._core,
            query,
            as_list("items", items, may_be_empty=True),
            labels=labels,
            label_token_ids=label_token_ids,
            item_labels=item_labels,
            item_label_token_ids=item_label_token_ids,
            apply_softmax=apply_softmax,
            readout=readout,
            item_first=item_first,
            return_usage=return_usage,
        )
        return cast("list[list[float]]", prepared.run(self._core, flow))

    @overload
    def rank(
        self,
        query: Text,
        documents: Iterable[Text],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        activation_fn: Activation | None = None,
        flow: Flow | None = None,
        return_usage: Literal[False] = False,
    ) -> list[RankedDocument]: ...

    @overload
    def rank(
        self,
        query: Text,
        documents: Iterable[Text],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        activation_fn: Activation | None = None,
        flow: Flow | None = None,
        return_usage: Literal[True],
    ) -> ScoreResult[list[RankedDocument]]: ...

    @checked
    def rank(
        self,
        query: Text,
        documents: Iterable[Text],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        activation_fn: Activation | None = None,
        flow: Flow | None = None,
        return_usage: bool = False,
    ) -> list[RankedDocument] | ScoreResult[list[RankedDocument]]:
        """Documents by their score for the query, best first, ties in the order given.

        Args:
          query: text or token ids.
          documents: texts or token ids.
          top_k: how many to return; None returns all.
          return_documents: put each document into its entry as "text".
          activation_fn: on the log-odds of the positive against the negative label, or on the
            logit of a prompt's only label or a classifier's only class; None is the prompt's own,
            see `PromptSpec.scale`: for most the sigmoid, which gives a probability.
          flow: as in `score`.
          return_usage: return a `ScoreResult` with the tokens it took.

        Returns:
          [{"corpus_id": index among documents, "score": float[, "text": document]}, ...]

        Raises:
          InputError, InputTypeError: an argument cannot be scored, or the scorer does not have two
            labels (negative, positive), or the one of a prompt with one; raised before the model
            runs.
          NonFiniteScoreError: as `score` raises it.
        """
        self._core.check_ready()
        prepared = prepare_rank(
            self._core,
            query,
            as_list("documents", documents, may_be_empty=True),
            top_k=top_k,
            return_documents=return_documents,
            activation_fn=activation_fn,
            return_usage=return_usage,
        )
        return cast("list[RankedDocument]", prepared.run(self._core, flow))

    @overload
    def predict(
        self,
        pairs: Iterable[Sequence[Text]],
        *,
        activation_fn: Activation | None = None,
        flow: Flow | None = None,
        show_progress_bar: bool = False,
        return_usage: Literal[False] = False,
    ) -> Scores: ...

    @overload
    def predict(
        self,
        pairs: Iterable[Sequence[Text]],
        *,
        activation_fn: Activation | None = None,
        flow: Flow | None = None,
        show_progress_bar: bool = False,
        return_usage: Literal[True],
    ) -> ScoreResult[Scores]: ...

    @checked
    def predict(
        self,
        pairs: Iterable[Sequence[Text]],
        *,
        activation_fn: Activation | None = None,
        flow: Flow | None = None,
        show_progress_bar: bool = False,
        return_usage: bool = False,
    ) -> Scores | ScoreResult[Scores]:
        """Score (query, document) pairs; pairs that share a query are packed together.

        Args:
          pairs: (query, document) each.
          activation_fn: on the log-odds, as in `rank`; `torch.nn.Identity()` returns them.
          flow: as in `score`.
          show_progress_bar: show one, counting pairs.
          return_usage: return a `ScoreResult` with the tokens it took.

        Returns:
          float32[num_pairs], in the order given.

        Raises:
          InputError, InputTypeError: a pair cannot be scored; raised before the model runs.
          ScoringError: the model failed on a query; its `scores` keeps those of all others.
          NonFiniteScoreError: as `score` raises it.
        """
        self._core.check_ready()
        found = as_pairs("pairs", pairs, may_be_empty=True)
        labels = self._core.head.for_ranking(self._core.default_labels, self._core.spec)
        groups = group_by_query(found)
        requests = [self._encode_group(found, index, labels) for index in groups]
        scores = np.full(len(found), np.nan, np.float32)
        usages: list[Usage] = []
        failures: list[tuple[int, Exception]] = []
        with tqdm(total=len(found), unit="pair", disable=not show_progress_bar) as bar:
            results = self._core.run(
                requests, LabelRead((labels,), False), flow=flow, progress=bar.update
            )
        for index, result in zip(groups, results, strict=True):
            try:
                if isinstance(result, Exception):
                    raise result
                scores[index] = self._core.activated(result, activation_fn)
                usages.append(result.usage)
            except Exception as failure:
                failures.append((index[0], failure))
        if failures:
            first, error = failures[0]
            raise ScoringError(
                f"{len(failures)} of {len(groups)} queries failed, the first at pairs[{first}] "
                f"({error}); the scores of the others are in this error's .scores",
                scores,
            ) from error
        usage = merge_usages(usages, groups)
        gaps = usage.non_finite_items
        self._core.check_finite(gaps, scores, "pairs[{}]".format)
        return ScoreResult(scores, usage) if return_usage else scores

    @overload
    def score_many(
        self,
        requests: Iterable[tuple[Text, Iterable[Text]] | ScoreRequest],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        flow: Flow | None = None,
        show_progress_bar: bool = False,
        return_usage: Literal[False] = False,
        return_exceptions: Literal[False] = False,
    ) -> list[list[list[float]]]: ...

    @overload
    def score_many(
        self,
        requests: Iterable[tuple[Text, Iterable[Text]] | ScoreRequest],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        flow: Flow | None = None,
        show_progress_bar: bool = False,
        return_usage: Literal[True],
        return_exceptions: Literal[False] = False,
    ) -> list[ScoreResult[list[list[float]]]]: ...

    @overload
    def score_many(
        self,
        requests: Iterable[tuple[Text, Iterable[Text]] | ScoreRequest],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        flow: Flow | None = None,
        show_progress_bar: bool = False,
        return_usage: bool = False,
        return_exceptions: Literal[True],
    ) -> list[Any]: ...

    @checked
    def score_many(
        self,
        requests: Iterable[tuple[Text, Iterable[Text]] | ScoreRequest],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        flow: Flow | None = None,
        show_progress_bar: bool = False,
        return_usage: bool = False,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """`score` for many queries, several in one launch; what they share is computed once.

        Args:
          requests: (query, items) each, or a `ScoreRequest` with options of its own; requests of
            different labels and readouts share launches.
          labels: as in `score`, of all requests that have none of their own.
          label_token_ids: labels as token ids, instead of `labels`.
          apply_softmax: as in `score`.
          readout: as in `score`.
          flow: as in `score`.
          show_progress_bar: show one, counting items.
          return_usage: return a `ScoreResult` for each request, with the tokens it took.
          return_exceptions: return the error of a request in the place of its result, errors of its
            arguments as well, and raise none of them.

        Returns:
          What `score` returns, for each request in the order given.

        Raises:
          InputError, InputTypeError: a request cannot be scored; raised before the model runs.
          ScoringError: the model failed on a request; its `scores` is what would have been
            returned, with None for each that failed.
          NonFiniteScoreError: as `score` raises it.
        """
        self._core.check_ready()
        defaults = ScoreRequest(
            "",
            (),
            labels=labels,
            label_token_ids=label_token_ids,
            apply_softmax=apply_softmax,
            readout=readout,
        )
        with tqdm(total=0, unit="item", disable=not show_progress_bar) as bar:
            return score_requests(
                self._core,
                requests,
                defaults,
                flow=flow,
                return_usage=return_usage,
                return_exceptions=return_exceptions,
                progress=functools.partial(_advance, bar),
            )

    @checked
    def score_stream(
        self,
        query: Text,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        max_items: int | None = None,
    ) -> Iterator[list[float]]:
        """`score` for items that are still arriving: takes a few, yields their scores, takes more.

        The first scores come after a few items; then as many are taken at a time as fill a launch.

        Args:
          query: as in `score`.
          items: any iterable, also an endless one; read only as far as scores are asked for.
          labels: as in `score`.
          label_token_ids: labels as token ids, instead of `labels`.
          apply_softmax: as in `score`.
          readout: as in `score`; the head of a `Hidden` sees the items of a launch.
          max_items: items taken at a time at most; None leaves it to the size of a launch.

        Yields:
          [P(label) for each label] of each item, in the order of the items.

        Raises:
          InputError, InputTypeError: an argument or an item cannot be scored; the scores of items
            before it, up to the last full launch, were yielded.
          NonFiniteScoreError: as `score` raises it; the scores of items before were yielded.
        """
        self._core.check_ready()
        reading = reading_of(
            self._core,
            0,
            labels=labels,
            label_token_ids=label_token_ids,
            apply_softmax=apply_softmax,
            readout=readout,
        )
        return stream(self._core, query, as_iterator("items", items), reading, max_items)

    @checked
    def decide(
        self,
        state: Any,
        questions: Questions,
        *,
        permutations: int = 1,
        flow: Flow | None = None,
    ) -> Decision:
        """Typed answers to many questions about one state, with a probability for every option.

        The state is computed once; a question sees the state and itself alone, so that its answer
        does not depend on the others.

        Args:
          state: text or JSON.
          questions: by id, `Noul`, `Choice` and `Score`, or dicts in the names of System One
            (`type`, `instructions`, `criteria`); or a list of dicts in OpenAI's shape.
          permutations: how many cyclic rotations of its options a question is asked in, each one
            more item; probabilities are their mean, and `order_spread` says how far they differed.
          flow: as in `score`.

        Returns:
          The answers in the order of the questions, by their ids (an unnamed one by its place).

        Raises:
          InputError, InputTypeError: a question is malformed, or too long with its state.
          UnsupportedModelError: the model is no language model, or its chat template no frame.
          NonFiniteScoreError: logits are NaN or infinite; its `scores` has the other answers.
        """
        self._core.check_ready()
        return self._ask().prepare(state, questions, permutations).run(self._core, flow)

    @checked
    def decide_many(
        self,
        requests: Iterable[tuple[Any, Questions]],
        *,
        permutations: int = 1,
        flow: Flow | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """`decide` for many states, several in one launch; what they share is computed once.

        Args:
          requests: (state, questions) each.
          permutations: as in `decide`.
          flow: as in `score`.
          return_exceptions: return the error of a request in the place of its decision, errors of
            its arguments as well, and raise none of them.

        Returns:
          A `Decision` for each request, in the order given.

        Raises:
          InputError, InputTypeError: a request is malformed; raised before the model runs.
          ScoringError: the model failed on a request; its `scores` has the decisions of the others,
            and None for each that failed.
        """
        self._core.check_ready()
        return self._ask().decide_many(
            requests, permutations=permutations, flow=flow, return_exceptions=return_exceptions
        )

    @checked
    def decide_stream(
        self,
        state: Any,
        questions: Mapping[str, Any] | Iterable[tuple[str, Any]],
        *,
        permutations: int = 1,
        max_items: int | None = None,
    ) -> Iterator[tuple[str, Answer]]:
        """`decide` for questions that are still arriving: takes a few, yields their answers.

        Args:
          state: as in `decide`.
          questions: by id, or (id, question) each of any iterable, which is read only as far as
            answers are asked for.
          permutations: as in `decide`.
          max_items: questions taken at a time at most; None leaves it to the size of a launch.

        Yields:
          (id, answer), in the order of the questions.

        Raises:
          InputError, InputTypeError: a question is malformed; the answers of those before it, up to
            the last full launch, were yielded.
          NonFiniteScoreError: as `decide` raises it.
        """
        self._core.check_ready()
        if isinstance(questions, Mapping):
            questions = questions.items()
        is_view = isinstance(questions, ItemsView)  # which is in order
        pairs = iter(questions) if is_view else as_iterator("questions", questions)
        return decide_stream(self._core, self._ask(), state, pairs, permutations, max_items)

    @overload
    async def async_score(
        self,
        query: Text,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        item_labels: Sequence[Sequence[str]] | None = None,
        item_label_token_ids: Sequence[LabelIds] | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        item_first: bool = False,
        return_usage: Literal[False] = False,
    ) -> list[list[float]]: ...

    @overload
    async def async_score(
        self,
        query: Text,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        item_labels: Sequence[Sequence[str]] | None = None,
        item_label_token_ids: Sequence[LabelIds] | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        item_first: bool = False,
        return_usage: Literal[True],
    ) -> ScoreResult[list[list[float]]]: ...

    async def async_score(
        self,
        query: Text,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        item_labels: Sequence[Sequence[str]] | None = None,
        item_label_token_ids: Sequence[LabelIds] | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        item_first: bool = False,
        return_usage: bool = False,
    ) -> list[list[float]] | ScoreResult[list[list[float]]]:
        """`score` for many tasks at once: what they ask meanwhile shares launches.

        Nothing is computed in the event loop. A task that is cancelled takes its request out of
        the queue. Whatever else tasks ask, other calls of this one scorer may run beside it.

        Args:
          query, items, labels, label_token_ids, item_labels, item_label_token_ids: as in `score`.
          apply_softmax, readout, item_first, return_usage: as in `score`.

        Returns:
          What `score` returns.

        Raises:
          QueueFullError: too much waits already; its `retry_after` says when to try again.
          BatcherClosedError: the batcher was closed.
          LaunchError: the launch that the request was in failed.
          InputError, InputTypeError, NotPatchedError, NonFiniteScoreError: as in `score`.
        """
        found = await self._submit(
            prepare_score,
            query,
            as_list("items", items, may_be_empty=True),
            labels=labels,
            label_token_ids=label_token_ids,
            item_labels=item_labels,
            item_label_token_ids=item_label_token_ids,
            apply_softmax=apply_softmax,
            readout=readout,
            item_first=item_first,
            return_usage=return_usage,
        )
        return cast("list[list[float]]", found)

    @overload
    async def async_rank(
        self,
        query: Text,
        documents: Iterable[Text],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        activation_fn: Activation | None = None,
        return_usage: Literal[False] = False,
    ) -> list[RankedDocument]: ...

    @overload
    async def async_rank(
        self,
        query: Text,
        documents: Iterable[Text],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        activation_fn: Activation | None = None,
        return_usage: Literal[True],
    ) -> ScoreResult[list[RankedDocument]]: ...

    async def async_rank(
        self,
        query: Text,
        documents: Iterable[Text],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        activation_fn: Activation | None = None,
        return_usage: bool = False,
    ) -> list[RankedDocument] | ScoreResult[list[RankedDocument]]:
        """`rank` for many tasks at once, as `async_score` is `score`.

        Args:
          query, documents, top_k, return_documents, activation_fn, return_usage: as in `rank`.

        Returns:
          What `rank` returns.

        Raises:
          QueueFullError, BatcherClosedError, LaunchError: as `async_score` raises them.
          InputError, InputTypeError, NotPatchedError, NonFiniteScoreError: as in `rank`.
        """
        found = await self._submit(
            prepare_rank,
            query,
            as_list("documents", documents, may_be_empty=True),
            top_k=top_k,
            return_documents=return_documents,
            activation_fn=activation_fn,
            return_usage=return_usage,
        )
        return cast("list[RankedDocument]", found)

    async def async_decide(
        self, state: Any, questions: Questions, *, permutations: int = 1
    ) -> Decision:
        """`decide` for many tasks at once, as `async_score` is `score`.

        Args:
          state, questions, permutations: as in `decide`.

        Returns:
          What `decide` returns.

        Raises:
          QueueFullError, BatcherClosedError, LaunchError: as `async_score` raises them.
          InputError, InputTypeError, UnsupportedModelError, NonFiniteScoreError: as in `decide`.
        """
        asking = functools.partial(_prepare_decide, self._ask)
        found = await self._submit(asking, state, questions, permutations=permutations)
        return cast(Decision, found)

    async def _submit(
        self, prepare: Callable[..., Prepared[Any]], *texts: Any, **options: Any
    ) -> Any:
        """The result of a request that `prepare` makes of the core and these, in the queue."""
        preparing = functools.partial(checked(prepare), self._core, *texts, **options)
        return await self.batcher.submit(preparing, texts)

    @property
    def batcher(self) -> Batcher:
        """The queue of `async_score` and its kin, made when it is first asked for."""
        with STARTING:
            if self._batcher is None or not self._batcher.is_ours:
                self._batcher = Batcher(self._core)
            return self._batcher

    @checked
    def start_batcher(
        self,
        *,
        max_requests: int = MAX_REQUESTS,
        max_tokens: int | None = None,
        window_seconds: float = WINDOW_SECONDS,
        max_request_tokens: int | None = None,
    ) -> Batcher:
        """Make the queue of `async_score` and its kin with limits of one's own.

        Args:
          max_requests: how many may wait; more are refused.
          max_tokens: how many tokens of items may wait; None is about a million.
          window_seconds: how long the first request of an idle queue waits for others; 0 does not.
          max_request_tokens: of one request, its query once and its items; more are refused with a
            `RequestTooLargeError`. None sets no limit.

        Returns:
          The queue, which `batcher` gives from now on; `with` closes it at its end.

        Raises:
          InputError, InputTypeError: there is one already, which is not closed; or a limit is out
            of range.
        """
        made = Batcher(
            self._core,
            max_requests=max_requests,
            max_tokens=max_tokens,
            window_seconds=window_seconds,
            max_request_tokens=max_request_tokens,
        )
        with STARTING:
            old = self._batcher
            if old is not None and old.is_ours and not old.is_closed:
                raise InputError(
                    "this scorer has a batcher already, since its first async call or "
                    "start_batcher; call start_batcher before them, or close it: await "
                    "scorer.batcher.aclose()"
                )
            self._batcher = made
        return made

    def __getstate__(self) -> dict[str, Any]:
        # a copy makes its own
        return {**self.__dict__, "_batcher": None}

    @checked
    def encode_questions(
        self, state: Any, questions: Questions, *, permutations: int = 1
    ) -> EncodedRequest:
        """The token ids that `decide` runs: the state's, and an item for each order of a question.

        Raises:
          InputError, InputTypeError, UnsupportedModelError: as `decide` raises them.
        """
        return self._ask().ask(state, questions, permutations).request

    def _ask(self) -> Decider:
        if self._decider is None:
            self._decider = Decider(self._core, self._tokenizer)
        return self._decider

    def prefix(self, query: Any) -> Prefix:
        """Compute a query once and hold it on the device, whatever else is scored meanwhile.

        JSON, and a text that questions are asked about, is held as the state of `decide`.

        >>> with scorer.prefix("what is a panda?") as p:   # doctest: +SKIP
        ...     first = p.score(documents)
        ...     more = p.score(others)                      # computes the items only

        Raises:
          InputError: the query cannot be scored, or does not fit into `prefix_cache_bytes` beside
            the ones that are held.
        """
        return Prefix(self._core, query, self._ask)

    def explain(self, query: Text, items: Iterable[Text]) -> Explanation:
        """Print the flows that `score` could take, with their predicted costs, and the choice.

        Labels of several tokens are not looked at, which run behind the items.

        Returns:
          What is printed, as data.
        """
        found = as_list("items", items)
        request = self._core.encode(query, found, ArgumentNames())
        explanation = self._core.runner.explain(request)
        print(explanation)
        return explanation

    @checked
    def calibrate(self, *, seconds: float = 5.0) -> None:
        """Measure launches of this model on this machine, for the planner's choices.

        Args:
          seconds: about how long it may take.
        """
        self._core.check_ready()
        self._core.runner.calibrate(seconds)

    def refresh(self) -> None:
        """Take the model as it is now: forget all queries on the device, and weights on another.

        Every call looks whether the model changed, and does this by itself where it sees it. What
        it may not see is a few values of a large tensor that were written behind torch's back.

        Raises:
          UnsupportedModelError: the model cannot be scored exactly any more.
        """
        self._core.copies.refresh(force=True)

    def clear_prefixes(self) -> None:
        """Forget all queries on the device, also those held by `prefix`, which become stale."""
        self._core.copies.clear()

    @property
    def label_token_ids(self) -> list[int] | list[list[int]] | None:
        """Ids of the scorer's own labels, as lists where one has several tokens; None: no label."""
        return self._core.default_labels.ids if self._core.default_labels else None

    def encode(self, query: Text, items: Iterable[Text]) -> EncodedRequest:
        """The token ids that `score(query, items)` runs: its prefix, and each item behind it.

        Raises:
          InputError, InputTypeError: the query or an item cannot be scored.
        """
        found = as_list("items", items)
        return self._core.encode(query, found, ArgumentNames(), _extra(self._core.default_labels))

    def _encode_group(self, pairs: list[Any], index: list[int], labels: Labels) -> EncodedRequest:
        names = ArgumentNames(f"pairs[{index[0]}][0]", lambda i: f"pairs[{index[i]}][1]")
        query, documents = pairs[index[0]][0], [pairs[i][1] for i in index]
        return self._core.encode(query, documents, names, labels.num_extra_tokens)


def _prepare_decide(
    decider: Callable[[], Decider], _: ScoringCore, state: Any, questions: Any, *, permutations: int
) -> Prepared[Decision]:
    return decider().prepare(state, questions, permutations)


def _extra(labels: Labels | None) -> int:
    return labels.num_extra_tokens if labels else 0


def _advance(bar: Any, total: int) -> Callable[[int], object]:
    """A bar of so many steps begins."""
    bar.total = total
    bar.refresh()
    return cast(Callable[[int], object], bar.update)
