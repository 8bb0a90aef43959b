"""The projections around attention, fused with the norms and the rotation beside them."""

from __future__ import annotations

from packscore_kernels.projections.api import can_project, project_out, project_qkv

__all__ = ["can_project", "project_out", "project_qkv"]
