"""Ordinary calls of a model, `model(input_ids=...)`, through its compiled programs.

Rows of a batch are packed as sequences of their own, without their padding. What programs cannot
serve (a cache, gradients in training, attentions, other inputs) runs the model's own forward.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from packscore.errors import MaskTooLargeError, UnsupportedModelError
from packscore.flows.engine import Readout
from packscore.flows.packing import PackedBatch, split_items
from packscore.interfaces import CAUSAL_OUTPUT, CLASSIFIER_OUTPUT
from packscore.model.family import base_model, is_classifier
from packscore.model.place import is_on_torchax
from packscore.model.plain import foreign_part
from packscore.model.stored import is_stored
from packscore_kernels.attention.layout import SegmentLayout

if TYPE_CHECKING:
    from packscore.programs.program import ModelProgram

logger = logging.getLogger("packscore")

Indices = npt.NDArray[np.int64]
# The compiled programs of models patched with a device, for as long as the models live.
_programs: WeakKeyDictionary[PreTrainedModel, ModelProgram] = WeakKeyDictionary()
# What programs may be asked for beside tokens: nothing that changes the numbers.
SERVED = {"input_ids", "attention_mask", "logits_to_keep"}
# and what may be said without asking for anything
UNASKED: Mapping[str, tuple[Any, ...]] = {
    "use_cache": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "return_dict": (None, False, True),
}
# The model's own forward on torchax does these with any attention that is causal.
ASKED_OF_TORCHAX = {"inputs_embeds", "labels", "use_cache", "return_dict", "output_hidden_states"}


@dataclass(frozen=True, eq=False)
class PlainCall:
    """A call that programs can serve."""

    input_ids: npt.NDArray[np.int64]  # [batch, num_columns]
    starts: Indices  # [batch]: first column that is no padding
    ends: Indices  # [batch]: column behind the last one that is needed
    columns: Indices  # [num_kept]: whose logits are wanted, of a language model
    return_dict: bool

    @property
    def lengths(self) -> Indices:
        """[batch]: tokens of every row, without padding."""
        return self.ends - self.starts


class NotServedError(Exception):
    """Why a call runs in torch; never leaves this module."""


class ServedForward:
    """What `model.forward` is while the model has programs.

    It looks the programs up at each call: a copy of the model, or one that was unpatched behind a
    wrapper's back, has none, and its calls run in torch.

    Args:
      model: held weakly, for the model holds this.
      own: a forward that another library had put on the instance; None: the class has it.
    """

    def __init__(self, model: PreTrainedModel, own: Callable[..., Any] | None = None) -> None:
        self._model = weakref.ref(model)
        self.own = own
        # pipelines and `generate` look at the parameters of forward
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))
        self.__doc__ = type(model).forward.__doc__

    def __reduce__(self) -> tuple[Any, ...]:
        # copies and pickles belong to the copied model
        return ServedForward, (self._model(), self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output: served by programs, or its own."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this forward is gone; keep the model, and call it")
        program = program_of(model)
        if program is not None:
            try:
                if is_on_torchax(model):
                    return self._in_torch(model, (), _row_arguments(model, program, args, kwargs))
                call = read_call(model, program.max_tokens, args, kwargs)
                _take_weights(program)
                return _serve(model, program, call)
            except (NotServedError, MaskTooLargeError) as reason:
                logger.debug("a call of %s runs in torch: %s", type(model).__name__, reason)
        return self._in_torch(model, args, kwargs)

    def _in_torch(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        own = self.own or type(model).forward.__get__(model)
        return own(*args, **kwargs)


def program_of(model: nn.Module) -> ModelProgram | None:
    """The compiled programs of a model patched with a `device`; None where torch scores it."""
    return _programs.get(base_model(model))


def serve(model: PreTrainedModel, program: ModelProgram) -> None:
    """Send ordinary calls of `model` to its programs, which `program_of` finds from now on.

    Those of one whose weights torch has not stay torch's, which refuses them by name.
    """
    _programs[model] = program
    if is_stored(model):
        return
    own = model.__dict__.get("forward")
    if not isinstance(own, ServedForward):
        model.__dict__["forward"] = ServedForward(model, own)


def leave(model: PreTrainedModel) -> None:
    """Undo `serve`; a wrapper that another library put around it since stays in place."""
    _programs.pop(model, None)
    served = model.__dict__.get("forward")
    if not isinstance(served, ServedForward):
        return
    del model.__dict__["forward"]
    if served.own is not None:
        model.__dict__["forward"] = served.own


def read_call(
    model: PreTrainedModel, max_tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> PlainCall:
    """What a call asks for.

    Raises:
      NotServedError: something that programs do not do.
    """
    _check_model(model)
    asked = _arguments(model, args, kwargs)
    ids, mask = asked["input_ids"], asked.get("attention_mask")
    _check_ids(ids, model.config.vocab_size)
    starts, ends = _bounds(ids, mask)
    columns = np.arange(ids.shape[1])
    if is_classifier(model):
        if "logits_to_keep" in asked:
            raise NotServedError("a classifier knows no logits_to_keep")
        ends = _pooled_ends(model, ids, starts, ends)
    else:
        columns = _kept_columns(asked.get("logits_to_keep", 0), ids.shape[1])
        # what follows the last wanted column is seen by no wanted one
        ends = np.clip(columns.max() + 1, starts, ends)
    if (ends - starts).max() > max_tokens:
        longest = int((ends - starts).max())
        logger.info(
            "a row of %d tokens is longer than the largest program (%d): it runs in torch",
            longest,
            max_tokens,
        )
        raise NotServedError(f"a row has {longest} tokens")
    return_dict = asked.get("return_dict")
    if return_dict is None:
        return_dict = model.config.return_dict
    return PlainCall(ids.numpy().astype(np.int64), starts, ends, columns, bool(return_dict))


def _row_arguments(
    model: PreTrainedModel, program: ModelProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call on torchax, with the op as its attention.

    Raises:
      NotServedError: the model's own attention runs, for more than causal order and padding.
    """
    _check_mode(model)
    given = _by_name(model, args, kwargs)
    _check_asked(given, SERVED | ASKED_OF_TORCHAX)
    tokens, mask = given.get("input_ids"), given.get("attention_mask")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    shape = None if mask is None else getattr(mask, "shape", ())
    if tokens is None or shape not in (None, tokens.shape[:2]):
        raise NotServedError("attention_mask is no [batch, num_tokens] tensor")
    if program.needs_mask(tokens.shape[1]):
        raise NotServedError("the model's attention has a window or a cap")
    return {**given, **program.row_arguments(mask)}


def _take_weights(program: ModelProgram) -> None:
    try:
        program.refresh()
    except UnsupportedModelError as error:  # an adapter, say, which torch computes
        raise NotServedError(str(error)) from error


def _check_model(model: PreTrainedModel) -> None:
    _check_mode(model)
    foreign = foreign_part(model, but_hooks_of=[model])
    if foreign:
        raise NotServedError(f"the model has {foreign}")


def _check_mode(model: PreTrainedModel) -> None:
    if model.training:
        raise NotServedError("the model is in train mode")
    if torch.compiler.is_compiling():
        raise NotServedError("the call is being traced")
    if model.config.output_attentions or model.config.output_hidden_states:
        raise NotServedError("the configuration asks for attentions or hidden states")


def _by_name(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by name."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    if len(args) > len(names) or set(names[: len(args)]) & set(kwargs):
        raise NotServedError("arguments that do not fit")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _arguments(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by name that were given and are not None."""
    given = _by_name(model, args, kwargs)
    _check_asked(given, SERVED)
    found = {name: value for name, value in given.items() if value is not None}
    if "input_ids" not in found:
        raise NotServedError("there are no input_ids")
    return found


def _check_asked(given: dict[str, Any], served: set[str]) -> None:
    for name, value in given.items():
        # "in" would compare tensors
        unasked = any(value is default for default in UNASKED.get(name, (None,)))
        if name not in served and not unasked:
            raise NotServedError(f"{name} is given")


def _check_ids(ids: Any, vocab_size: int) -> None:
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or not ids.numel():
        raise NotServedError("input_ids is no filled [batch, num_tokens] tensor")
    if ids.device.type != "cpu" or ids.dtype not in (torch.int64, torch.int32):
        raise NotServedError(f"input_ids is {ids.dtype} on {ids.device}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise NotServedError("an id is not in the vocabulary")


def _bounds(ids: torch.Tensor, mask: Any) -> tuple[Indices, Indices]:
    """(first column, column behind the last one) of every row's tokens."""
    batch, num_columns = ids.shape
    if mask is None:
        return np.zeros(batch, np.int64), np.full(batch, num_columns, np.int64)
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape or mask.device.type != "cpu":
        raise NotServedError("attention_mask is no [batch, num_tokens] tensor")
    visible = mask.to(torch.bool).numpy()
    starts = visible.argmax(1)
    ends = num_columns - visible[:, ::-1].argmax(1)
    lengths = visible.sum(1)
    if not lengths.all() or (ends - starts != lengths).any():
        raise NotServedError("attention_mask has a row of zeros, or zeros between ones")
    return starts.astype(np.int64), ends.astype(np.int64)


def _pooled_ends(
    model: PreTrainedModel, ids: torch.Tensor, starts: Indices, ends: Indices
) -> Indices:
    """The column behind the token that Hugging Face reads classes at: the last that is no pad."""
    pad: int | None = model.config.get_text_config().pad_token_id
    if pad is None:
        if len(ids) > 1:
            raise NotServedError("a batch needs a pad_token_id")
        pooled = np.full(1, ids.shape[1] - 1)
    else:
        pooled = (np.arange(ids.shape[1]) * (ids.numpy() != pad)).argmax(1)
    if (pooled < starts).any() or (pooled >= ends).any():
        raise NotServedError("classes would be read at a token that the mask hides")
    found: Indices = pooled.astype(np.int64) + 1
    return found


def _kept_columns(logits_to_keep: Any, num_columns: int) -> Indices:
    columns = np.arange(num_columns)
    if isinstance(logits_to_keep, torch.Tensor):
        if logits_to_keep.dim() != 1 or logits_to_keep.dtype.is_floating_point:
            raise NotServedError("logits_to_keep is not one row of columns")
        logits_to_keep = logits_to_keep.cpu().numpy()
    elif isinstance(logits_to_keep, int):
        logits_to_keep = slice(-logits_to_keep, None)
    else:
        raise NotServedError("logits_to_keep is neither a number nor a tensor")
    try:
        kept: Indices = columns[logits_to_keep]
    except IndexError as error:
        raise NotServedError("logits_to_keep names a column that is not there") from error
    if not len(kept):
        raise NotServedError("logits_to_keep keeps nothing")
    return kept


def _serve(model: PreTrainedModel, program: ModelProgram, call: PlainCall) -> Any:
    output: Any
    if is_classifier(model):
        output = CLASSIFIER_OUTPUT()(logits=_class_logits(model, program, call))
    else:
        output = CAUSAL_OUTPUT()(logits=_token_logits(model, program, call))
    return output if call.return_dict else output.to_tuple()


def _parts(call: PlainCall, max_tokens: int) -> Iterator[tuple[Indices, PackedBatch]]:
    """(which rows, these rows as sequences of their own) of each program the call needs."""
    filled = np.flatnonzero(call.lengths)
    for part in split_items(0, call.lengths[filled].tolist(), max_tokens):
        rows = filled[part]
        ids = [call.input_ids[r, call.starts[r] : call.ends[r]] for r in rows]
        layout = SegmentLayout.single(0, call.lengths[rows].astype(np.int32))
        yield rows, PackedBatch(np.concatenate(ids), layout)


def _most_tokens(program: ModelProgram, call: PlainCall) -> int:
    """Tokens of one launch: where a mask is needed a row's, for every pair of tokens costs."""
    longest = int(call.lengths.max(initial=1))
    return longest if program.needs_mask(longest) else program.max_tokens


def _class_logits(model: PreTrainedModel, program: ModelProgram, call: PlainCall) -> torch.Tensor:
    """[batch, num_classes] in the model's dtype."""
    classes = Readout(tuple(range(program.num_classes)), over_vocabulary=False)
    logits = torch.empty(len(call.input_ids), program.num_classes, dtype=model.dtype)
    for rows, batch in _parts(call, _most_tokens(program, call)):
        found = program.run(batch, classes).logits
        logits[torch.from_numpy(rows)] = found.to(model.dtype)
    return logits


def _token_logits(model: PreTrainedModel, program: ModelProgram, call: PlainCall) -> torch.Tensor:
    """[batch, num_kept, vocab_size] in the model's dtype; zeros where a kept column is padding."""
    shape = (len(call.input_ids), len(call.columns), model.config.vocab_size)
    logits = torch.zeros(shape, dtype=model.dtype)
    for rows, batch in _parts(call, _most_tokens(program, call)):
        starts, ends = call.starts[rows], call.ends[rows]
        wanted = (call.columns >= starts[:, None]) & (call.columns < ends[:, None])
        member, kept = np.nonzero(wanted)
        tokens = batch.layout.item_bounds[member, 0] + call.columns[kept] - starts[member]
        to_row, to_column = torch.from_numpy(rows[member]), torch.from_numpy(kept)
        for start, found in program.logits(batch, tokens):
            index = slice(start, start + len(found))
            logits[to_row[index], to_column[index]] = found
    return logits
