"""A sentence-transformers CrossEncoder whose pairs are packed query by query."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from packscore.integrations.loading import kept_scorer
from packscore.integrations.pairs import (
    Pair,
    check_inputs,
    check_joins,
    check_no_special_tokens,
    is_text_pair,
    launches_of,
    refused_pairs,
)
from packscore.interfaces import COMPILED_CALL
from packscore.model.class_head import check_head_is_trained, has_new_head
from packscore.model.family import base_model
from packscore.model.plain import modules_of
from packscore.patching import patch_model
from packscore.results import NonFiniteChoice
from packscore.scoring import MultiItemScorer
from packscore.text.named import AUTO, PROMPTS, prompt_for, resolve_prompt
from packscore.text.prompts import PromptSpec

try:
    import sentence_transformers
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    from packscore.integrations.cross_encoder_base import Base, options_since_6_2
except ImportError as error:
    raise MissingPackageError("packscore.CrossEncoder", "sentence-transformers") from error

# What sentence-transformers itself keeps from the template's variables.
NOT_TEMPLATE_VARIABLES = {"padding", "truncation", "max_length", "return_tensors", "restore_suffix"}
SUPPORTED_MODULES = (
    "Transformer and LogitScore (yes/no), or Transformer of the task 'sequence-classification'"
)
PACKED = "packscore_pairs"  # what `forward` knows packed pairs by


class CrossEncoder(Base):
    """`sentence_transformers.CrossEncoder`, computing each query once for all its documents.

    It is a subclass: loading, `predict`, `rank`, their keywords, defaults and return types,
    prompts, saving and evaluators are sentence-transformers' own. What differs is the forward: the
    pairs of one query are packed behind it, and never padded. `batch_size` is how many pairs of
    different queries share a launch; one query's pairs are never split.

    Args:
      model_name_or_path: as in sentence-transformers.
      template: the prompt's frame, a name of `PROMPTS` or "auto", or a `PromptSpec`; None takes the
        tokenizer's chat template, as sentence-transformers does.
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
        model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        template: str | PromptSpec | None = None,
        split_special_tokens: bool | None = None,
        on_non_finite: NonFiniteChoice = "raise",
        **kwargs: Any,
    ) -> None:
        check_choice("on_non_finite", on_non_finite, get_args(NonFiniteChoice))
        self.on_non_finite: NonFiniteChoice = on_non_finite
        self.template = None if template in (None, AUTO) else resolve_prompt(template)
        self.split_special_tokens = split_special_tokens
        self._scorers: dict[str, MultiItemScorer] = {}
        if kwargs.get("backend", "torch") != "torch":
            raise InputError(f"backend={kwargs['backend']!r} must be 'torch' to be packed")
        super().__init__(model_name_or_path and os.fspath(model_name_or_path), **kwargs)
        if self.model is None:  # modules of other kinds; scores are refused
            return
        self._check_modules()
        if template == AUTO:
            name = base_model(self.model).config.name_or_path
            self.template = resolve_prompt(prompt_for(template, model_name_or_path, name))
        patch_model(self.model)
        # what a head that nothing trained gives is refused when it is asked for: training may come
        if self._packs and not has_new_head(base_model(self.model)):
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
            trust_remote_code=cross_encoder.trust_remote_code,
            **options_since_6_2(cross_encoder),
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
        ranked.sort(key=lambda entry: entry["corpus_id"])  # NaN may have left it in any order
        ranked.sort(key=lambda entry: inf if isnan(entry["score"]) else -entry["score"])
        return ranked[:top_k]

    def forward(self, input: Any, **kwargs: Any) -> Any:
        """As sentence-transformers' own; of pairs that are packed, their scores.

        Packed pairs come this way too, so that what others put around it (a hook, the autocast of a
        trainer) has its effect on them.
        """
        if PACKED not in input:
            return super().forward(input, **kwargs)
        scorer, pairs = input[PACKED]
        log_odds = scorer.predict(pairs, activation_fn=nn.Identity())
        return {"scores": torch.from_numpy(log_odds)[:, None]}

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
        options: dict[str, Any] = {
            "prompt": prompt,
            "batch_size": batch_size,
            "activation_fn": activation_fn,
            "apply_softmax": apply_softmax,
            "device": device,
        }
        own = functools.partial(super()._inference, show_progress_bar=False, **options)
        target = self._resolve_inference_device(device)
        if any(module.training for module in modules_of(self)):
            self.eval()
        check_inputs(inputs)
        if not inputs:
            return own(inputs=[])
        if kwargs or not self._packs or not all(map(is_text_pair, inputs)):
            self._check_own(inputs)
            shown = {**options, "show_progress_bar": show_progress_bar, **kwargs}
            scores = super()._inference(inputs=inputs, **shown)
            self._check_finite(scores.isnan(), scores)
            return scores
        log_odds, alone, failure = self._packed(inputs, prompt, batch_size, show_progress_bar)
        gaps = log_odds[:, 0].isnan()  # which an activation may make numbers of
        scores = log_odds.to(target)
        if activation_fn is not None:
            scores = activation_fn(scores)
        scores = scores.squeeze(-1) if scores.ndim > 1 else scores
        if alone:
            found = own(inputs=[inputs[i] for i in alone])
            scores[alone], gaps[alone] = found.to(scores), found.isnan().cpu()
        if gaps.any():
            scores = scores.masked_fill(gaps.to(scores.device), torch.nan)
        if failure is not None:
            raise ScoringError(str(failure), scores) from failure.__cause__
        self._check_finite(gaps, scores)
        return scores

    def _packed(
        self, inputs: list[Any], prompt: str | None, batch_size: int, show_progress_bar: bool
    ) -> tuple[torch.Tensor, list[int], ScoringError | None]:
        """Log-odds of pairs of text, which of them cannot be packed, and what launches met."""
        pairs: list[Pair] = [(query, document) for query, document in inputs]
        if prompt and self.template is None and not self._has_chat_frame:
            # without a frame for it, sentence-transformers puts the prompt before the query
            pairs = [(prompt + query, document) for query, document in pairs]
        log_odds, scorer = torch.zeros(len(pairs), 1), self._scorer(prompt)
        alone: list[int] = []
        failures: list[ScoringError] = []
        launches = list(launches_of(pairs, batch_size))
        for index in tqdm(launches, desc="Batches", disable=not show_progress_bar):
            try:
                features = {PACKED: (scorer, [pairs[i] for i in index])}
                log_odds[index] = self(features)["scores"].reshape(-1, 1).cpu().float()
            except ScoringError as failure:
                failures.append(failure)
                log_odds[index, 0] = torch.from_numpy(failure.scores)
            except InputError:  # before the model ran: all but the queries it is about run again
                refused = refused_pairs(scorer, pairs, index)
                if not refused:
                    raise
                self._check_own([inputs[i] for i in refused])
                alone += refused
                rest = [i for i in index if i not in set(refused)]
                launches += [rest] if rest else []
        if not failures:
            return log_odds, alone, None
        found = ScoringError(
            f"{len(failures)} of {len(launches)} launches failed, the first because {failures[0]}",
            log_odds,
        )
        found.__cause__ = failures[0]
        return log_odds, alone, found

    def _check_finite(self, gaps: torch.Tensor, scores: torch.Tensor) -> None:
        """Refuse scores that are no numbers, unless they are to be reported."""
        if self.on_non_finite == "raise" and gaps.any():
            where = gaps.reshape(len(gaps), -1).any(-1).nonzero()[:, 0].tolist()
            raise NonFiniteScoreError.at(where, scores, "inputs[{}]".format)

    def _check_own(self, inputs: Sequence[Any]) -> None:
        """Refuse what sentence-transformers' own forward must not score in place of a packed one.

        Raises:
          UnsupportedModelError: the modules are of other kinds, or the head is random.
          InputError: a template or texts that it would not treat as this class does.
        """
        if self.model is None:
            self._check_modules()
        check_head_is_trained(base_model(self._first.model))
        if self.template is not None:
            raise InputError(
                f"inputs[0]={short(inputs[0])} cannot be packed, and what is not runs without "
                "template=; pass pairs of text, whose query is not empty and leaves room"
            )
        split = self.split_special_tokens
        if self._has_chat_frame if split is None else split:
            check_no_special_tokens(self.tokenizer, inputs)

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

    @property
    def _packs(self) -> bool:
        """Whether pairs are packed: one score each, in a frame that holds them.

        Others, and calls of a model that was compiled, run as sentence-transformers' own.
        """
        if self.num_labels != 1 or getattr(self, COMPILED_CALL.name) is not None:
            return False
        formatter = self._first.input_formatter
        variables = self._template_variables()
        return not self._has_chat_frame or formatter.pair_roles_failure(variables) is None

    def _scorer(self, prompt: str | None) -> MultiItemScorer:
        """The scorer of a prompt; made again when what sentence-transformers reads changed."""
        variables = self._template_variables()
        key = repr((prompt, self.max_seq_length, self._chat_template(), variables))
        return kept_scorer(self._scorers, key, lambda: self._make_scorer(prompt))

    def _make_scorer(self, prompt: str | None) -> MultiItemScorer:
        limit = int(self._first.model.config.max_position_embeddings)
        frame = self._frame(prompt)
        if isinstance(self[-1], LogitScore):
            ids = self[-1].false_token_id, self[-1].true_token_id
            frame = replace(frame, labels=tuple(i for i in ids if i is not None))
        return MultiItemScorer(
            self._first.model,
            self.tokenizer,
            prompt=frame,
            instruction=None if self.template is None else prompt,
            max_tokens=min(int(self.max_seq_length or limit), limit),
            split_special_tokens=self.split_special_tokens,
            on_non_finite="report",  # `_inference` looks at all launches together
        )

    def _frame(self, prompt: str | None) -> PromptSpec:
        """What stands around query and document.

        Raises:
          UnsupportedModelError: the tokenizer's own way cannot be packed.
          InputError: a prompt that the template has no place for.
        """
        if self.template is not None:
            if prompt and "instruction" not in self.template.shared_fields:
                raise InputError(
                    f"prompt={short(prompt)} has no place in this template; use {{instruction}} in "
                    "its prefix, or pass no prompt"
                )
            return self.template
        if self._has_chat_frame:
            return PromptSpec.from_render(functools.partial(self._render, prompt))
        check_joins(self.tokenizer)
        return PROMPTS["plain"]

    @property
    def _has_chat_frame(self) -> bool:
        return self.template is None and "message" in self._first.modality_config

    def _chat_template(self) -> Any:
        return getattr(self._first.processor, "chat_template", None)

    def _template_variables(self) -> dict[str, Any]:
        options = self._first.processing_kwargs.get("chat_template", {})
        return {key: x for key, x in options.items() if key not in NOT_TEMPLATE_VARIABLES}

    def _render(self, prompt: str | None, *, query: str, item: str) -> str:
        formatter = self._first.input_formatter
        messages = formatter.pair_to_messages((query, item))
        if prompt:
            (messages,) = formatter.prepend_prompt_to_messages([messages], prompt)
        text: str = self._first.processor.apply_chat_template(
            messages, tokenize=False, **self._template_variables()
        )
        return text
