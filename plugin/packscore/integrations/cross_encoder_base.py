"""sentence-transformers' CrossEncoder with the one step that packing takes over, in every version.

From 6.2 on `predict` resolves its arguments and calls `_inference`; 6.1 does both in `predict`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import sentence_transformers
import torch

Own = sentence_transformers.CrossEncoder


class _InTwoSteps(Own):
    """6.1's, whose `predict` calls `_inference` as that of 6.2 does."""

    @torch.inference_mode()
    def predict(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        pool: Any = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As sentence-transformers' own; several processes call it once more, in each of them."""
        options: dict[str, Any] = {
            "batch_size": batch_size,
            "show_progress_bar": show_progress_bar,
            "apply_softmax": apply_softmax,
        }
        if pool is not None or (isinstance(device, list) and device):
            return super().predict(
                inputs,
                prompt_name=prompt_name,
                prompt=prompt,
                activation_fn=activation_fn,
                convert_to_numpy=convert_to_numpy,
                convert_to_tensor=convert_to_tensor,
                device=device,
                pool=pool,
                chunk_size=chunk_size,
                **options,
                **kwargs,
            )
        if batch_size <= 0:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size}.")
        is_one = self.is_singular_input(inputs)
        pairs = inputs.tolist() if isinstance(inputs, np.ndarray) else inputs
        scores: Any = self._inference(
            [pairs] if is_one else list(pairs),
            prompt=self._resolve_prompt(prompt, prompt_name),
            activation_fn=activation_fn or self.activation_fn,
            device=device,
            **options,
            **kwargs,
        )
        if not convert_to_tensor:
            as_array = scores.float().cpu().numpy() if len(scores) else np.array([])
            scores = as_array if convert_to_numpy else list(scores)
        return scores[0] if is_one else scores

    def _inference(self, inputs: list[Any], **options: Any) -> torch.Tensor:
        is_one = len(inputs) == 1 and self.is_singular_input(inputs[0])
        asked = inputs[0] if is_one else inputs
        scores: torch.Tensor = super().predict(asked, convert_to_tensor=True, **options)
        return scores[None] if is_one else scores

    def _resolve_inference_device(self, device: Any) -> Any:
        target = str(self.device) if device is None else device
        self.to(target)
        return target


def options_since_6_2(cross_encoder: Own) -> dict[str, Any]:
    """Options of a CrossEncoder that 6.1 does not take."""
    names = ("keep_in_fp32_modules",)
    return {name: getattr(cross_encoder, name) for name in names if hasattr(cross_encoder, name)}


if TYPE_CHECKING:
    Base = Own
else:
    Base = Own if hasattr(Own, "_inference") else _InTwoSteps
