"""Score many items against one query: pack, run the model once, read the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm.auto import tqdm

from packscore.encoding import (
    ArgumentNames,
    Budget,
    EncodedRequest,
    PlainEncoder,
    PromptEncoder,
    RequestEncoder,
    group_by_query,
)
from packscore.errors import InputError, NotPatchedError, ScoringError
from packscore.head import LabelHead
from packscore.inputs import Text, as_list, as_pairs, check_choice, check_count, short
from packscore.patching import base_model, check_supported, is_patched, program_of
from packscore.prompts import PromptSpec, resolve_prompt
from packscore.results import RankedDocument, ScoreResult, Usage, merge_usages
from packscore.running import LabelLogits, run_program, run_torch
from packscore.tokenizing import PieceTokenizer

Activation = Callable[[torch.Tensor], torch.Tensor]
Scores = npt.NDArray[np.float32]


class MultiItemScorer:
    """Scores of many items against one query, equal to scoring each item alone.

    `score(query, items)[k]` is what the model gives for `query ids + item k ids` by itself. The
    query is computed once; every item sees the query and itself only.

    Args:
      model: a causal Hugging Face model in eval mode, after `patch_model(model)`.
      tokenizer: its tokenizer, which is copied and never changed; without one, pass token ids.
      prompt: a name ("plain", "qwen3-reranker", "yes-no") or a `PromptSpec`; None is "plain".
      mask_impl: "segment" (no mask at all), "dense" (a 4-D mask through the model's own attention,
        num_tokens x num_tokens, also for a model that is not patched), or "auto" (segment).
      instruction: what `{instruction}` of the prompt becomes; None takes the prompt's default.
      labels: default label texts; None takes the prompt's.
      label_token_ids: default labels as token ids, instead of `labels`.
      max_tokens: budget of query and one item; None takes the prompt's or the model's own.
      on_long: "truncate" cuts the end of items over the budget and reports them, "error" raises.
      split_special_tokens: encode special tokens in texts as ordinary text, so that a document
        cannot forge the prompt's frame.

    Raises:
      UnsupportedModelError: the model cannot be scored exactly, or has no language-model head.
      NotPatchedError: the model is not patched and `mask_impl` is not "dense".
      InputError, InputTypeError: an option does not exist or does not fit the others.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        prompt: str | PromptSpec | None = None,
        mask_impl: Literal["auto", "segment", "dense"] = "auto",
        instruction: str | None = None,
        labels: Sequence[str] | None = None,
        label_token_ids: Sequence[int] | None = None,
        max_tokens: int | None = None,
        on_long: Literal["truncate", "error"] = "truncate",
        split_special_tokens: bool = True,
    ) -> None:
        check_supported(model)
        check_choice("mask_impl", mask_impl, ("auto", "segment", "dense"))
        check_choice("on_long", on_long, ("truncate", "error"))
        self.model = model
        self.mask_impl: Literal["segment", "dense"] = "dense" if mask_impl == "dense" else "segment"
        self._base = base_model(model)
        self._check_patched()
        spec = resolve_prompt(prompt)
        pieces = None if tokenizer is None else PieceTokenizer(tokenizer)
        self._head = LabelHead(self._base, pieces)
        vocab_size = self._head.vocab_size
        model_limit = int(self._base.config.max_position_embeddings)
        check_count("max_tokens", max_tokens, model_limit)
        budget = Budget(max_tokens or min(spec.max_tokens or model_limit, model_limit), on_long)
        self._encoder: RequestEncoder
        if spec.joins_ids:
            self._encoder = PlainEncoder(
                pieces, budget, vocab_size, split_special_tokens=split_special_tokens
            )
        elif pieces is None:
            raise InputError(f"prompt={short(prompt)} is text, which needs a tokenizer; pass one")
        else:
            self._encoder = PromptEncoder(
                pieces,
                budget,
                spec,
                instruction=spec.instruction if instruction is None else instruction,
                split_special_tokens=split_special_tokens,
            )
        if labels is None and label_token_ids is None and spec.labels:
            labels = spec.labels
        self._default_label_ids = self._head.resolve(labels, label_token_ids)

    @overload
    def score(
        self,
        query: Text,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: Sequence[int] | None = None,
        apply_softmax: bool = False,
        item_first: bool = False,
        return_usage: Literal[False] = False,
    ) -> list[list[float]]: ...

    @overload
    def score(
        self,
        query: Text,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: Sequence[int] | None = None,
        apply_softmax: bool = False,
        item_first: bool = False,
        return_usage: Literal[True],
    ) -> ScoreResult[list[list[float]]]: ...

    def score(
        self,
        query: Text,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: Sequence[int] | None = None,
        apply_softmax: bool = False,
        item_first: bool = False,
        return_usage: bool = False,
    ) -> list[list[float]] | ScoreResult[list[list[float]]]:
        """Probability of every label at the end of every item.

        Args:
          query: text, or token ids (with the prompt "plain").
          items: texts or token ids, one kind only; an empty item is scored at the query's end.
          labels: label texts of one token each; None takes the scorer's.
          label_token_ids: labels as token ids, instead of `labels`.
          apply_softmax: softmax over the labels alone; False: over the whole vocabulary.
          item_first: score `item + query` instead; then nothing is shared between items.
          return_usage: return a `ScoreResult` with the tokens it took.

        Returns:
          [[P(label) for each label] for each item], in the order given.

        Raises:
          InputError, InputTypeError: an argument cannot be scored; raised before the model runs.
          NotPatchedError: the model was unpatched since.
        """
        self._check_ready()
        label_ids = self._head.resolve(labels, label_token_ids) or self._default_label_ids
        if label_ids is None:
            raise InputError("labels are missing, and the prompt has none; pass labels=[...]")
        found = as_list("items", items)
        request = self._encoder.encode(query, found, ArgumentNames(), item_first=item_first)
        result = self._label_logits(request, label_ids, over_vocabulary=not apply_softmax)
        with torch.inference_mode():
            log_probs = result.logits - result.normalizer[:, None]
            scores: list[list[float]] = log_probs.exp().tolist()
        return ScoreResult(scores, result.usage) if return_usage else scores

    @overload
    def rank(
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
    def rank(
        self,
        query: Text,
        documents: Iterable[Text],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        activation_fn: Activation | None = None,
        return_usage: Literal[True],
    ) -> ScoreResult[list[RankedDocument]]: ...

    def rank(
        self,
        query: Text,
        documents: Iterable[Text],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        activation_fn: Activation | None = None,
        return_usage: bool = False,
    ) -> list[RankedDocument] | ScoreResult[list[RankedDocument]]:
        """Documents by their score for the query, best first, ties in the order given.

        Args:
          query: text or token ids.
          documents: texts or token ids.
          top_k: how many to return; None returns all.
          return_documents: put each document into its entry as "text".
          activation_fn: on the log-odds of the positive against the negative label; None is the
            sigmoid, which gives the probability of the positive one.
          return_usage: return a `ScoreResult` with the tokens it took.

        Returns:
          [{"corpus_id": index among documents, "score": float[, "text": document]}, ...]

        Raises:
          InputError, InputTypeError: an argument cannot be scored, or the scorer does not have two
            labels (negative, positive); raised before the model runs.
        """
        self._check_ready()
        check_count("top_k", top_k)
        found = as_list("documents", documents)
        names = ArgumentNames(item="documents[{}]".format)
        label_ids = self._two_labels()
        request = self._encoder.encode(query, found, names)
        scores, usage = self._activated_log_odds(request, label_ids, activation_fn)
        ranked: list[RankedDocument] = []
        for i in np.argsort(-scores, kind="stable")[:top_k].tolist():
            ranked.append({"corpus_id": i, "score": float(scores[i])})
            if return_documents:
                ranked[-1]["text"] = found[i]
        return ScoreResult(ranked, usage) if return_usage else ranked

    @overload
    def predict(
        self,
        pairs: Iterable[Sequence[Text]],
        *,
        activation_fn: Activation | None = None,
        show_progress_bar: bool = False,
        return_usage: Literal[False] = False,
    ) -> Scores: ...

    @overload
    def predict(
        self,
        pairs: Iterable[Sequence[Text]],
        *,
        activation_fn: Activation | None = None,
        show_progress_bar: bool = False,
        return_usage: Literal[True],
    ) -> ScoreResult[Scores]: ...

    def predict(
        self,
        pairs: Iterable[Sequence[Text]],
        *,
        activation_fn: Activation | None = None,
        show_progress_bar: bool = False,
        return_usage: bool = False,
    ) -> Scores | ScoreResult[Scores]:
        """Score (query, document) pairs; pairs that share a query are packed together.

        Args:
          pairs: (query, document) each.
          activation_fn: on the log-odds, as in `rank`; `torch.nn.Identity()` returns them.
          show_progress_bar: show one, counting pairs.
          return_usage: return a `ScoreResult` with the tokens it took.

        Returns:
          float32[num_pairs], in the order given.

        Raises:
          InputError, InputTypeError: a pair cannot be scored; raised before the model runs.
          ScoringError: the model failed on a query; its `scores` keeps those of all others.
        """
        self._check_ready()
        found = as_pairs("pairs", pairs)
        label_ids = self._two_labels()
        groups = group_by_query(found)
        requests = [self._encode_group(found, index) for index in groups]
        scores = np.full(len(found), np.nan, np.float32)
        usages: list[Usage] = []
        failures: list[tuple[int, Exception]] = []
        with tqdm(total=len(found), unit="pair", disable=not show_progress_bar) as bar:
            for index, request in zip(groups, requests, strict=True):
                try:
                    scores[index], usage = self._activated_log_odds(
                        request, label_ids, activation_fn
                    )
                    usages.append(usage)
                except Exception as failure:
                    failures.append((index[0], failure))
                bar.update(len(index))
        if failures:
            first, error = failures[0]
            raise ScoringError(
                f"{len(failures)} of {len(groups)} queries failed, the first at pairs[{first}] "
                f"({error}); the scores of the others are in this error's .scores",
                scores,
            ) from error
        return ScoreResult(scores, merge_usages(usages, groups)) if return_usage else scores

    def _encode_group(self, pairs: list[Any], index: list[int]) -> EncodedRequest:
        names = ArgumentNames(f"pairs[{index[0]}][0]", lambda i: f"pairs[{index[i]}][1]")
        return self._encoder.encode(pairs[index[0]][0], [pairs[i][1] for i in index], names)

    def _activated_log_odds(
        self, request: EncodedRequest, label_ids: list[int], activation_fn: Activation | None
    ) -> tuple[Scores, Usage]:
        found = self._label_logits(request, label_ids, over_vocabulary=False)
        with torch.inference_mode():
            negative, positive = found.logits.unbind(-1)
            activated = (activation_fn or torch.sigmoid)(positive - negative)
        return activated.float().cpu().numpy(), found.usage

    def _label_logits(
        self, request: EncodedRequest, label_ids: list[int], *, over_vocabulary: bool
    ) -> LabelLogits:
        program = program_of(self._base)
        if program is not None and self.mask_impl == "segment":
            return run_program(program, request, label_ids, over_vocabulary)
        return run_torch(
            self._base, self._head, request, label_ids, over_vocabulary, self.mask_impl
        )

    def _check_ready(self) -> None:
        self._check_patched()
        if self._base.training:
            raise InputError("model is in train mode, where dropout is random; call model.eval()")

    def _check_patched(self) -> None:
        if self.mask_impl == "segment" and not is_patched(self.model):
            raise NotPatchedError(
                "model is not patched; call packscore.patch_model(model) first, "
                "or pass mask_impl='dense'"
            )

    def _two_labels(self) -> list[int]:
        ids = self._default_label_ids
        if ids is None or len(ids) != 2:
            raise InputError(
                f"labels: rank and predict compare two, (negative, positive), and this scorer has "
                f"{len(ids or ())}; pass MultiItemScorer(..., labels=['no', 'yes'])"
            )
        return ids
