"""A sentence-transformers CrossEncoder whose pairs are packed query by query."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from math import inf, isnan
from typing import Any, get_args

import torch
from torch import nn
from tqdm.auto import tqdm

from packscore.errors import (
    InputError,
    InputTypeError,
    MissingPackageError,
    NonFiniteScoreError,
    ScoringError,
    UnsupportedModelError,
)
from packscore.inputs import check_choice, short
from packscore.integrations.chat_template import PROBES, spec_of_chat_template
from packscore.integrations.loading import kept_scorer
from packscore.patching import patch_model
from packscore.results import NonFiniteChoice
from packscore.scoring import MultiItemScorer
from packscore.text.encoding import group_by_query
from packscore.text.prompts import PROMPTS, PromptSpec, resolve_prompt, template_fields
from packscore.text.tokenizer import PieceTokenizer

try:
    import sentence_transformers
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore
except ImportError as error:
    raise MissingPackageError("packscore.CrossEncoder", "sentence-transformers") from error

# What sentence-transformers itself keeps from the template's variables.
NOT_TEMPLATE_VARIABLES = {"padding", "truncation", "max_length", "return_tensors", "restore_suffix"}
SUPPORTED_MODULES = (
    "Transformer and LogitScore (yes/no), or Transformer of the task 'sequence-classification'"
)
Pair = tuple[str, str]


class CrossEncoder(sentence_transformers.CrossEncoder):
    """`sentence_transformers.CrossEncoder`, computing each query once for all its documents.

    It is a subclass: loading, `predict`, `rank`, their keywords, defaults and return types,
    prompts, saving and evaluators are sentence-transformers' own. What differs is the forward: the
    pairs of one query are packed behind it, and never padded. `batch_size` is how many pairs of
    different queries share a launch; one query's pairs are never split.

    Args:
      model_name_or_path: as in sentence-transformers.
      template: the prompt's frame, a name ("qwen3-reranker", "yes-no", "plain") or a `PromptSpec`;
        None takes the tokenizer's chat template, as sentence-transformers does.
      split_special_tokens: as in `MultiItemScorer`; None reads special tokens in texts as ordinary
        text where a template frames them; False is what sentence-transformers does.
      on_non_finite: as in `MultiItemScorer`; `rank` puts what is no number last.
      **kwargs: any other argument of `sentence_transformers.CrossEncoder`.

    Raises:
      UnsupportedModelError: the modules, the model or its chat template cannot be packed exactly.
      InputError: a backend other than torch.
    """

    def __init__(
        self,
        model_name_or_path: str | None = None,
        *,
        template: str | PromptSpec | None = None,
        split_special_tokens: bool | None = None,
        on_non_finite: NonFiniteChoice = "raise",
        **kwargs: Any,
    ) -> None:
        check_choice("on_non_finite", on_non_finite, get_args(NonFiniteChoice))
        self.on_non_finite: NonFiniteChoice = on_non_finite
        self.template = None if template is None else resolve_prompt(template)
        self.split_special_tokens = split_special_tokens
        self._scorers: dict[str, MultiItemScorer] = {}
        if kwargs.get("backend", "torch") != "torch":
            raise InputError(f"backend={kwargs['backend']!r} must be 'torch' to be packed")
        super().__init__(model_name_or_path, **kwargs)
        self._check_modules()
        patch_model(self._first.model)
        self._scorer(self._resolve_prompt(None, None))

    @classmethod
    def from_sentence_transformers(
        cls,
        cross_encoder: sentence_transformers.CrossEncoder,
        *,
        template: str | PromptSpec | None = None,
        split_special_tokens: bool | None = None,
        on_non_finite: NonFiniteChoice = "raise",
    ) -> CrossEncoder:
        """A packed CrossEncoder that shares the modules of one that is loaded already.

        The language model is patched in place, which changes nothing for `cross_encoder`;
        `unpatch_model(cross_encoder.model)` takes the patch back.

        Args:
          cross_encoder: a `sentence_transformers.CrossEncoder`.
          template: as in the constructor.
          template, split_special_tokens, on_non_finite: as in the constructor.

        Returns:
          A `CrossEncoder` with the same weights, prompts, activation and device.

        Raises:
          InputTypeError: it is no CrossEncoder.
          UnsupportedModelError: it cannot be packed exactly.
        """
        if not isinstance(cross_encoder, sentence_transformers.CrossEncoder):
            raise InputTypeError(
                f"cross_encoder is a {type(cross_encoder).__name__}; it must be a "
                "sentence_transformers.CrossEncoder"
            )
        return cls(
            modules=list(cross_encoder),
            prompts=dict(cross_encoder.prompts),
            default_prompt_name=cross_encoder.default_prompt_name,
            activation_fn=cross_encoder.activation_fn,
            keep_in_fp32_modules=cross_encoder.keep_in_fp32_modules,
            trust_remote_code=cross_encoder.trust_remote_code,
            backend=cross_encoder.get_backend(),
            device=str(cross_encoder.device),
            template=template,
            split_special_tokens=split_special_tokens,
            on_non_finite=on_non_finite,
        )

    def rank(
        self, query: Any, documents: Any, top_k: int | None = None, *args: Any, **kwargs: Any
    ) -> list[Any]:
        """As sentence-transformers' own, with what is no number behind all numbers."""
        ranked: list[Any] = [*super().rank(query, documents, None, *args, **kwargs)]
        # sorted by comparisons, which NaN fails all of: any order may have come out
        ranked.sort(key=lambda entry: entry["corpus_id"])
        ranked.sort(key=lambda entry: inf if isnan(entry["score"]) else -entry["score"])
        return ranked[:top_k]

    @torch.inference_mode()
    def _inference(  # type: ignore[override]  # sentence-transformers' own says the same
        self,
        inputs: list[Any],
        *,
        prompt: str | None,
        batch_size: int,
        show_progress_bar: bool,
        activation_fn: Callable[[torch.Tensor], torch.Tensor] | None,
        apply_softmax: bool | None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """What sentence-transformers' `predict` calls once its arguments are resolved.

        `apply_softmax` acts on several labels; of one score it changes nothing, there as here.

        Returns:
          float32[num_pairs], on the model's device.

        Raises:
          NonFiniteScoreError, ScoringError: as `MultiItemScorer.predict` raises them.
        """
        if kwargs:
            raise InputTypeError(
                f"{', '.join(kwargs)}: packscore encodes pairs by itself and cannot honour "
                "tokenizer options of one call; set them when the CrossEncoder is made"
            )
        target = self._resolve_inference_device(device)
        self.eval()
        pairs = _text_pairs(inputs)
        if prompt and self.template is None and not self._has_chat_frame:
            # without a frame for it, sentence-transformers puts the prompt before the query
            pairs = [(prompt + query, document) for query, document in pairs]
        scores, failures = torch.zeros(len(pairs), 1), []
        scorer = self._scorer(prompt)
        launches = list(_launches(pairs, batch_size))
        for index in tqdm(launches, desc="Batches", disable=not show_progress_bar):
            try:
                log_odds = scorer.predict([pairs[i] for i in index], activation_fn=nn.Identity())
            except ScoringError as failure:
                failures.append(failure)
                log_odds = failure.scores
            scores[index, 0] = torch.from_numpy(log_odds)
        gaps = scores[:, 0].isnan()  # which an activation may make numbers of
        scores = scores.to(target)
        if activation_fn is not None and pairs:
            scores = activation_fn(scores)
        scores = scores.squeeze(-1) if scores.ndim > 1 else scores
        if gaps.any():
            scores = scores.masked_fill(gaps.to(scores.device), torch.nan)
        if failures:
            raise ScoringError(
                f"{len(failures)} of {len(launches)} launches failed, the first because "
                f"{failures[0]}",
                scores,
            ) from failures[0]
        if gaps.any() and self.on_non_finite == "raise":
            where = gaps.nonzero()[:, 0].tolist()
            raise NonFiniteScoreError.at(where, scores, "inputs[{}]".format)
        return scores

    def _multi_process(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse what would start other processes.

        Raises:
          InputError: always.
        """
        raise InputError(
            "pool and a list of devices are not supported: one launch holds all pairs of a query; "
            "make one CrossEncoder for each device, device='cuda:0' and so on"
        )

    def __getstate__(self) -> dict[str, Any]:
        # scorers hold locks and pages; a copy makes its own when it needs them
        return {**self.__dict__, "_scorers": {}}

    @property
    def _first(self) -> Any:
        # Any: modules index as torch types, and each attribute would need a cast
        return self[0]

    def _check_modules(self) -> None:
        names = [type(module).__name__ for module in self]
        first = self[0]
        task = first.transformer_task if isinstance(first, Transformer) else None
        causal = task == "text-generation" and isinstance(self[-1], LogitScore) and len(names) == 2
        if not causal and not (task == "sequence-classification" and len(names) == 1):
            raise UnsupportedModelError(
                f"modules={names} of the task {task!r} cannot be packed; "
                f"they must be {SUPPORTED_MODULES}"
            )
        if causal and self[-1].false_token_id is None:
            raise UnsupportedModelError(
                f"false_token_id=None scores the raw logit of token {self[-1].true_token_id}, and "
                "packscore compares two tokens; use sentence_transformers.CrossEncoder for it"
            )
        if not causal and self.num_labels != 1:
            raise UnsupportedModelError(
                f"num_labels={self.num_labels} must be 1 to score pairs; use MultiItemScorer.score "
                "for several labels"
            )

    def _scorer(self, prompt: str | None) -> MultiItemScorer:
        """The scorer of a prompt; made again when what sentence-transformers reads changed."""
        variables = self._template_variables()
        key = repr((prompt, self.max_seq_length, self._chat_template(), variables))
        return kept_scorer(self._scorers, key, lambda: self._make_scorer(prompt))

    def _make_scorer(self, prompt: str | None) -> MultiItemScorer:
        limit = int(self._first.model.config.max_position_embeddings)
        labels: dict[str, Any] = {}
        if isinstance(self[-1], LogitScore):
            labels["label_token_ids"] = [self[-1].false_token_id, self[-1].true_token_id]
        return MultiItemScorer(
            self._first.model,
            self.tokenizer,
            prompt=self._frame(prompt),
            instruction=None if self.template is None else prompt,
            max_tokens=min(int(self.max_seq_length or limit), limit),
            split_special_tokens=self.split_special_tokens,
            on_non_finite="report",  # `_inference` looks at all launches together
            **labels,
        )

    def _frame(self, prompt: str | None) -> PromptSpec:
        """What stands around query and document.

        Raises:
          UnsupportedModelError: the tokenizer's own way cannot be packed.
          InputError: a prompt that the template has no place for.
        """
        if self.template is not None:
            if prompt and "instruction" not in template_fields(self.template.prefix):
                raise InputError(
                    f"prompt={short(prompt)} has no place in this template; use {{instruction}} in "
                    "its prefix, or pass no prompt"
                )
            return self.template
        if self._has_chat_frame:
            return spec_of_chat_template(functools.partial(self._render, prompt))
        self._check_joins()
        return PROMPTS["plain"]

    @property
    def _has_chat_frame(self) -> bool:
        return self.template is None and "message" in self._first.modality_config

    def _chat_template(self) -> Any:
        return getattr(self._first.processor, "chat_template", None)

    def _template_variables(self) -> dict[str, Any]:
        options = self._first.processing_kwargs.get("chat_template", {})
        return {key: x for key, x in options.items() if key not in NOT_TEMPLATE_VARIABLES}

    def _render(self, prompt: str | None, query: str, document: str) -> str:
        formatter = self._first.input_formatter
        messages = formatter.pair_to_messages((query, document))
        if prompt:
            (messages,) = formatter.prepend_prompt_to_messages([messages], prompt)
        text: str = self._first.processor.apply_chat_template(
            messages, tokenize=False, **self._template_variables()
        )
        return text

    def _check_joins(self) -> None:
        """Whether a tokenizer without a chat template joins the ids of query and document.

        Raises:
          UnsupportedModelError: it puts tokens of its own between or behind them.
        """
        pieces = PieceTokenizer(self.tokenizer)
        leading, trailing = pieces.leading_ids, pieces.trailing_ids
        for query, document in PROBES:
            found = self.tokenizer(query, document)["input_ids"]
            parts = self.tokenizer([query, document], add_special_tokens=False)["input_ids"]
            if found != [*leading, *parts[0], *parts[1], *trailing]:
                raise UnsupportedModelError(
                    f"tokenizer={type(self.tokenizer).__name__} has no chat template and adds "
                    "tokens of its own to a pair; pass template=PromptSpec(...) that spells them"
                )


def _text_pairs(inputs: Sequence[Any]) -> list[Pair]:
    """The inputs of `predict` as pairs of text.

    Raises:
      InputTypeError: an entry is no pair of strings.
    """
    for i, pair in enumerate(inputs):
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise InputTypeError(
                f"inputs[{i}]={short(pair)} must be a pair of strings, (query, document)"
            )
    return [(query, document) for query, document in inputs]


def _launches(pairs: list[Pair], batch_size: int) -> Iterator[list[int]]:
    """Indices of the pairs of each launch: whole queries, together at most `batch_size` pairs.

    A query with more documents than that is a launch of its own: packed, they cost less memory than
    a padded batch, and its own chunks bound what runs at a time.
    """
    launch: list[int] = []
    for group in group_by_query(pairs):
        if launch and len(launch) + len(group) > batch_size:
            yield launch
            launch = []
        launch = [*launch, *group]
    if launch:
        yield launch
