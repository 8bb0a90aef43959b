"""One run of requests: leases on their prefixes, shares to launch, results to hand back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from packscore.encoded import EncodedRequest
from packscore.flows.packing import Share
from packscore.flows.page_pool import PrefixLease
from packscore.flows.planner import Plan
from packscore.results import Flow, MaskImpl, Usage


@dataclass(frozen=True)
class LabelLogits:
    """What scores are made of, in float32 and in the order of the items."""

    logits: torch.Tensor  # [num_items, num_labels]
    normalizer: torch.Tensor  # [num_items]: log-sum-exp over the vocabulary or over the labels
    usage: Usage


@dataclass(eq=False)
class _Job:
    """One request on its way: its plan, the shares still to launch, what came back."""

    request: EncodedRequest
    plan: Plan
    shares: deque[Share]
    lease: PrefixLease | None
    is_held: bool  # by the caller, who releases it
    was_whole: bool
    computed_tokens: int = 0
    computed_prefix_tokens: int = 0
    padding_tokens: float = 0.0
    is_causal: bool = False

    def release(self) -> None:
        if self.lease is not None and not self.is_held:
            self.lease.release()


def usage_of(job: _Job, mask_impl: MaskImpl) -> Usage:
    """The usage of one request."""
    request = job.request
    prompt_tokens = len(request.prefix) * len(request.items) + sum(map(len, request.items))
    return Usage(
        prompt_tokens=prompt_tokens,
        computed_tokens=job.computed_tokens,
        computed_prefix_tokens=job.computed_prefix_tokens,
        prefix_tokens_saved=prompt_tokens - job.computed_tokens,
        padding_tokens=round(job.padding_tokens),
        truncated_items=tuple(request.truncated_items),
        special_token_items=tuple(request.special_token_items),
        flow=_flow_of(job),
        mask_impl="causal" if job.is_causal else mask_impl,
    )


def _flow_of(job: _Job) -> Flow:
    if job.was_whole and job.plan.flow != "plain":
        return "extend"
    if not len(job.request.prefix) or len(job.request.items) == 1:
        return "plain"
    if job.plan.flow == "packed" and job.plan.num_launches > 1:
        return "chunked"
    return job.plan.flow
