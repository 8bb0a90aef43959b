"""What can be wrong with a layout or the op's arguments, said before it is wrong silently."""

from __future__ import annotations

import numpy as np

from packscore_kernels.attention.layout import SegmentLayout
from packscore_kernels.attention.types import BlockSizes
from packscore_kernels.errors import ArgumentError, LayoutError
from packscore_kernels.hardware import cdiv


def check_layout(
    layout: SegmentLayout,
    block_sizes: BlockSizes,
    page_size: int,
    num_pages: int | None,
    max_groups: int,
    max_pages: int,
) -> None:
    """Value checks on the host.

    Raises:
      LayoutError: naming what is wrong, what it is and what it must be.
    """
    if layout.num_real_tokens > layout.num_tokens:
        raise LayoutError(
            f"the groups hold {layout.num_real_tokens} tokens, more than {layout.num_tokens=}"
        )
    if len(layout.groups) > max_groups:
        raise LayoutError(f"the layout has {len(layout.groups)} groups, more than {max_groups=}")
    if page_size and block_sizes.block_kv % page_size:
        raise LayoutError(f"{block_sizes.block_kv=} must be a multiple of {page_size=}")
    places: dict[int, tuple[int, int]] = {}
    total = 0
    for g, group in enumerate(layout.groups):
        lens = np.asarray(group.item_lens)
        if group.prefix_len < 0 or group.cached_len < 0 or (lens < 0).any():
            raise LayoutError(f"group {g} has a negative length")
        if group.cached_len and not page_size:
            raise LayoutError(f"group {g} has {group.cached_len=}, so page_size must be given")
        needed = cdiv(group.cached_len, page_size) if page_size else 0
        pages = np.asarray(group.page_indices)
        if len(pages) != needed:
            raise LayoutError(
                f"group {g} has {len(pages)} page_indices; {group.cached_len=} with {page_size=}"
                f" must have {needed}"
            )
        total += len(pages)
        if len(pages) and (pages.min() < 0 or (num_pages is not None and pages.max() >= num_pages)):
            raise LayoutError(
                f"page_indices of group {g} lie in {pages.min()}..{pages.max()}; they must lie in"
                f" 0..{num_pages if num_pages is None else num_pages - 1}"
            )
        if len(np.unique(pages)) != len(pages):
            raise LayoutError(f"page_indices of group {g} name one page twice")
        for index, p in enumerate(pages.tolist()):
            # groups may share the start of their prefixes, and then the pages it lies in
            owner, place = places.setdefault(p, (g, index))
            if place != index:
                raise LayoutError(
                    f"page {p} is entry {place} of group {owner} and entry {index} of group {g}; "
                    "groups may share the start of a prefix only"
                )
    if total > max_pages:
        raise LayoutError(f"the layout names {total} pages, more than {max_pages=}")


def check_arrays(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    dtypes: tuple[str, str, str],
    pages: tuple[tuple[int, ...], str] | None,
    num_tokens: int,
    page_size: int,
) -> None:
    """Static checks at trace time.

    Raises:
      ArgumentError: naming what is wrong, what it is and what it must be.
    """
    if len(q_shape) != 3 or len(k_shape) != 3:
        raise ArgumentError(f"{q_shape=} and {k_shape=} must be [num_heads, num_tokens, head_dim]")
    if k_shape != v_shape:
        raise ArgumentError(f"{k_shape=} must equal {v_shape=}")
    if q_shape[1:] != k_shape[1:]:
        raise ArgumentError(f"{q_shape=} and {k_shape=} must agree after the heads")
    if not k_shape[0] or q_shape[0] % k_shape[0]:
        raise ArgumentError(
            f"num_q_heads={q_shape[0]} must be a multiple of num_kv_heads={k_shape[0]}"
        )
    if q_shape[1] != num_tokens:
        raise ArgumentError(f"q has {q_shape[1]} tokens; the layout's bucket has {num_tokens}")
    if len(set(dtypes)) != 1 or dtypes[0] not in ("bfloat16", "float32"):
        raise ArgumentError(f"q, k, v have {dtypes=}; they must all be bfloat16 or all float32")
    if page_size and pages is None:
        raise ArgumentError(f"the layout has {page_size=}, so kv_pages must be given")
    if pages is not None:
        want = (k_shape[0], 2, page_size, k_shape[2])
        if not page_size:
            raise ArgumentError("kv_pages is given, but the layout was built without page_size")
        if pages[1] != dtypes[0]:
            raise ArgumentError(f"kv_pages has dtype {pages[1]}; it must have q's, {dtypes[0]}")
        if pages[0][1:] != want:
            raise ArgumentError(
                f"kv_pages has shape {pages[0]}; it must be [num_pages, num_kv_heads, 2, page_size,"
                f" head_dim] with {want} after num_pages"
            )
