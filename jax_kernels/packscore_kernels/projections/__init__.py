"""The dense half of a decoder layer: projections and MLP, fused with the norms beside them."""

from __future__ import annotations

from packscore_kernels.projections.api import (
    can_gate,
    can_project,
    gated_mlp,
    project_out,
    project_qkv,
)

__all__ = ["can_gate", "can_project", "gated_mlp", "project_out", "project_qkv"]
