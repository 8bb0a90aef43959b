"""One model and its scorer, what is held of it, and the checks against the unpatched model."""

from __future__ import annotations

import contextlib
import copy
import inspect
import signal
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from ledger import BooksError, HungError, Ledger, LostError, WrongError
from subjects import Engine, Subject
from torch import nn

from helpers import LABELS, lease_of
from packscore import MultiItemScorer, UnsupportedModelError, patch_model, unpatch_model
from packscore.calls import program_of
from packscore.errors import ScoringError
from packscore.flows.page_pool import PAGE_SIZE
from packscore.model.family import base_model, is_classifier
from packscore.verify import TOLERANCES, Tolerance
from page_books import check_books

Ids = list[int]
Request = tuple[Ids, list[Ids]]
Call = Callable[[], tuple[Any, str]]  # scores, and by which flow
PAIR = LABELS[:2]
STEP_SECONDS = 60


class World:
    """What the machine acts on; the checks that every call goes through."""

    engine: ClassVar[Engine] = "torch"
    ledger: ClassVar[Ledger] = Ledger()
    scorer: MultiItemScorer

    def start(self, subject: Subject) -> None:
        self.subject = subject
        model = subject.make()
        if self.engine != "dense":
            patch_model(model, device=self.device)
        page_bytes = PAGE_SIZE * 2 * subject.num_layers * subject.num_kv_heads * 16 * 4
        self.cache_bytes = (6 if subject.has_small_cache else 64) * page_bytes
        self.scorer = MultiItemScorer(
            model,
            label_token_ids=None if is_classifier(base_model(model)) else PAIR,
            mask_impl="dense" if self.engine == "dense" else "auto",
            prefix_cache_bytes=self.cache_bytes,
        )
        # (prefix, its tokens, how many changes there had been)
        self.held: list[tuple[Any, Ids, int]] = []
        self.stream: tuple[Any, Request, int] | None = None  # and how many came out of it
        self.pipeline: Any = None
        self.refusals: set[str] = set()  # what programs may say of the changes made so far
        self.change, self.num_changes = "none", 0
        self.changes: set[str] = set()
        self.last: Callable[[], None] | None = None
        self.ledger.examples += not self.ledger.is_closed

    def changed(self, name: str, refused: str | None = None) -> None:
        self.change = name
        self.changes.add(name)
        self.num_changes += 1
        if refused:
            self.refusals.add(refused)
        if self.subject.tied:  # and is no longer, behind some
            self.refusals.add("parameter 'lm_head.weight' is not one of a plain")

    @property
    def device(self) -> str | None:
        return "jax" if self.engine == "jax" else None

    @property
    def model(self) -> Any:
        return self.scorer.model

    @property
    def base(self) -> Any:
        return base_model(self.scorer.model)

    @property
    def is_class(self) -> bool:
        return is_classifier(self.base)

    @property
    def engine_now(self) -> str:
        """A copy of a model with programs scores in torch."""
        is_lost = self.engine == "jax" and program_of(self.base) is None
        return "torch" if is_lost else self.engine

    @property
    def dtype(self) -> str:
        return str(self.base.dtype).removeprefix("torch.")

    def told(self) -> str:
        return f"after {self.change} on {self.engine_now} in {self.dtype}"

    # what has to come out

    def plain(self) -> Any:
        """The model as it is, unpatched."""
        return unpatch_model(copy.deepcopy(self.model))

    @torch.no_grad()
    def expected(self, requests: list[Request], over_labels: bool, model: Any) -> np.ndarray:
        """float64[num_items, num_labels]: each item alone, through the model's whole forward."""
        labels, rows = [0, 1] if self.is_class else PAIR, {}
        whole = [(*prefix, *item) for prefix, items in requests for item in items]
        for ids in dict.fromkeys(whole):
            output = model(input_ids=torch.tensor([ids]), use_cache=False)
            logits = output[0] if isinstance(output, tuple) else output.logits
            row = (logits[0] if self.is_class else logits[0, -1]).double()
            rows[ids] = row[labels].softmax(-1) if over_labels else row.softmax(-1)[labels]
        found = torch.stack([rows[ids] for ids in whole]).numpy()
        if not np.isfinite(found).all():
            raise ArithmeticError("the model's own scores are not finite")
        return found

    @property
    def is_rough(self) -> bool:
        """Whether it computes in 16 bits."""
        return torch.is_autocast_enabled("cpu") or self.base.dtype.itemsize == 2

    def tolerance(self) -> Tolerance:
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else self.base.dtype
        return TOLERANCES.get(dtype, TOLERANCES[torch.float32])

    def is_as_near(self, found: np.ndarray, want: np.ndarray, requests: list[Request]) -> bool:
        """Whether scores of 16 bits are as near to those of 64 as the model's own are.

        What a change has made of the weights may round worse than any trained model's.
        """
        model = self.plain().double()
        try:
            with torch.autocast("cpu", enabled=False):
                exact = self.expected(requests, self.over_labels, model)
        except RuntimeError:  # a forward of another model's, in 16 bits still
            return False
        exact = exact[:, 1] if want.ndim == 1 else exact
        own = np.abs(want - exact).max()
        return bool(np.abs(found - exact).max() <= 2 * own + self.tolerance().max_abs)

    # what does

    def check(
        self,
        name: str,
        requests: list[Request],
        call: Call,
        *,
        over_labels: bool = False,
        is_positive_alone: bool = False,
        may_refuse: Callable[[Any], bool] = lambda _: False,
    ) -> bool:
        """A call against the unpatched model, or its refusal against what may be refused."""
        self.over_labels = over_labels or is_positive_alone
        try:
            want = self.expected(requests, self.over_labels, self.plain())
        except Exception as error:  # the model itself fails: nothing to compare
            self.ledger.undefined[f"{self.change}: {str(error)[:70]}"] += 1
            return False
        self._note_sizes(name, requests)
        try:
            rows, flow = call()
        except Exception as error:
            cause = error.__cause__ if isinstance(error, ScoringError) else error
            if self.is_documented(cause) or may_refuse(cause):
                self.ledger.refused[type(cause).__name__] += 1
                return False
            if str(cause) == self.own_failure():
                self.ledger.undefined[f"{self.change}: {str(cause)[:70]}"] += 1
                return False
            raise LostError(f"{name} {self.told()}: {cause!r}") from error
        want = want[:, 1] if is_positive_alone else want
        found = np.asarray(rows, np.float64)
        if found.shape != want.shape:
            raise LostError(f"{name} {self.told()}: {found.shape} and not {want.shape}")
        off, most = np.abs(found - want), self.tolerance()
        is_near = off.max() <= most.max_abs and off.mean() <= most.mean_abs
        if not is_near and not (self.is_rough and self.is_as_near(found, want, requests)):
            raise WrongError(f"{name} {self.told()} by {flow}: off by {off.max():.2g}")
        self.ledger.note((flow, self.engine_now, self.change, self.dtype), rows)
        return True

    def _note_sizes(self, name: str, requests: list[Request]) -> None:
        if self.ledger.is_closed:
            return
        self.ledger.calls[name, self.engine] += 1
        for prefix, items in requests:
            self.ledger.prefix_lens[len(prefix)] += 1
            self.ledger.item_lens.update(map(len, items))
            self.ledger.item_counts[len(items)] += 1

    def is_documented(self, error: object) -> bool:
        """Programs refuse by name what they cannot follow, and only after such a change."""
        is_refused = isinstance(error, UnsupportedModelError) and self.engine_now == "jax"
        return is_refused and any(text in str(error) for text in self.refusals)

    def own_failure(self) -> str | None:
        """What the model itself says to a call, as it is and where it is; None: nothing."""
        try:
            with torch.inference_mode():
                self.model(input_ids=torch.tensor([[1, 2, 3]]))
        except Exception as error:
            return str(error)
        return None

    def fails_itself(self) -> bool:
        """Whether the unpatched model does."""
        try:
            self.expected([([1, 2], [[3]])], True, self.plain())
        except Exception:
            return True
        return False

    def check_refused(self, kind: type[Exception], says: str) -> None:
        try:
            self.scorer.score([1, 2], [[3], [4, 5]])
        except kind as error:
            if says in str(error):
                self.ledger.refused[kind.__name__] += 1
                return
            raise
        raise WrongError(f"{self.change} is not refused: {says}")

    def check_pages(self) -> None:
        """Every page is free, kept, or leased by what is held."""
        found = self.scorer._core._copies
        pool = found[1].first.pool if found else None
        if pool is None:
            return
        leases = [lease_of(held) for held, _, _ in self.held]
        if self.stream is not None:
            running = inspect.getgeneratorlocals(self.stream[0]).get("running")
            if running is not None:
                leases.append(inspect.getgeneratorlocals(running).get("lease"))
        live = [x for x in leases if x is not None and x.pool is pool and not x.is_released]
        pinned = {int(page) for lease in live for page in lease.pages}
        if pool.num_pinned_pages != len(pinned):
            raise BooksError(
                f"{self.told()}: {pool.num_pinned_pages} pages are pinned, {len(pinned)} leased"
            )
        if not any(lease.is_stale for lease in live):  # a stale one's are in no tree
            try:
                check_books(pool, live)
            except AssertionError as error:
                raise BooksError(f"{self.told()}: {error}") from error

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A step that hangs ends."""

        def ring(*_: Any) -> None:
            raise HungError(f"{STEP_SECONDS} seconds {self.told()}")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, STEP_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self.ledger.steps += not self.ledger.is_closed

    def let_go(self) -> None:
        """Of all that is held."""
        for held, _, _ in self.held:
            held.release()
        self.held.clear()
        if self.stream is not None:
            self.stream[0].close()
        self.stream = self.pipeline = self.last = None


def part_with_dropout(layer: Any) -> nn.Module:
    """Hangs dropout, at rest, behind a layer's attention; once is enough."""
    attention = layer.self_attn
    if not isinstance(attention.o_proj, nn.Sequential):
        attention.o_proj = nn.Sequential(attention.o_proj, nn.Dropout(0.5).eval())
    part: nn.Module = attention.o_proj[1]
    return part
