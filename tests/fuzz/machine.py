"""A model that is called and changed at random; every score is held against the unpatched model."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from draws import (
    ACTIONS,
    AUTOCAST,
    FLOW,
    ITEMS,
    MOSTLY,
    PREFIXES,
    SMALL_ITEMS,
    SMALL_PREFIXES,
    SUBJECTS,
    action,
    has,
    items_of,
    only_if,
    prefix_of,
)
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from ledger import BooksError, LostError, WrongError
from subjects import (
    ADAPTERS,
    MODULES,
    OTHERS,
    PLAIN,
    STEPS,
    VALUES,
    Subject,
    layers_of,
    put_back,
    what_runs,
)
from transformers import AttentionInterface
from world import PAIR, Ids, Request, World, part_with_dropout

from helpers import engine_of
from packscore import InputError, NotPatchedError, StalePrefixError, patch_model, unpatch_model
from packscore.calls import program_of
from packscore.flows.page_pool import PAGE_SIZE
from packscore.integrations.pipeline import MultiItemScoringPipeline
from packscore.model.family import REGISTERED_NAMES
from packscore.verify import verify_parity
from packscore_kernels.hardware import cdiv


class ModelMachine(World, RuleBasedStateMachine):
    """Calls, changes, and what is held between them."""

    @initialize(subject=SUBJECTS, data=st.data())
    def begin(self, subject: Subject, data: Any) -> None:
        if self.engine == "jax":  # what programs take; each model has its own to compile
            dtype = "bfloat16" if subject.dtype == "bfloat16" else "float32"
            subject = replace(subject, kind="qwen3", dtype=dtype, is_wrapped=False)
        if subject.kind == "qwen3_moe":  # float64 it has not, and of 16 bits one is another expert
            subject = replace(subject, dtype="float32")
        self.start(replace(subject, engine=self.engine))
        self.score(data, over_labels=True, autocast=False, flow=None)  # leaves pages behind

    def request(self, data: Any) -> Request:
        small = self.engine == "jax"
        prefix = prefix_of(data.draw(SMALL_PREFIXES if small else PREFIXES, "prefix"))
        return prefix, items_of(data.draw(SMALL_ITEMS if small else ITEMS, "items"), prefix)

    def run(self, call: Callable[[], object], autocast: bool = False) -> None:
        autocast = autocast and self.subject.kind != "qwen3_moe"

        def made() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                call()

        self.num_changes += autocast
        with self.watched():
            made()
        self.num_changes += autocast
        self.last = lambda: self.run(call, autocast)

    # calls

    @action(weight=2, data=st.data(), over_labels=st.booleans(), autocast=AUTOCAST, flow=FLOW)
    def score(self, data: Any, over_labels: bool, autocast: bool, flow: Any) -> None:
        prefix, items = self.request(data)

        def call() -> tuple[Any, str]:
            found = self.scorer.score(
                prefix, items, apply_softmax=over_labels, flow=flow, return_usage=True
            )
            return found.scores, found.usage.flow

        def has_no_such_flow(error: Any) -> bool:
            return isinstance(error, InputError) and str(error).startswith("flow=")

        options: Any = {"over_labels": over_labels, "may_refuse": has_no_such_flow}
        self.run(lambda: self.check("score", [(prefix, items)], call, **options), autocast)

    @action(data=st.data())
    def rank(self, data: Any) -> None:
        prefix, items = self.request(data)

        def call() -> tuple[Any, str]:
            found = self.scorer.rank(prefix, items, return_usage=True)
            scores = [one["score"] for one in found.scores]
            if scores != sorted(scores, reverse=True):
                raise WrongError("documents are not ranked by their scores")
            by_item = {one["corpus_id"]: one["score"] for one in found.scores}
            return [by_item[i] for i in range(len(items))], found.usage.flow

        self.run(lambda: self.check("rank", [(prefix, items)], call, is_positive_alone=True))

    @action(data=st.data(), count=st.integers(1, 3))
    def predict(self, data: Any, count: int) -> None:
        requests = [self.request(data) for _ in range(count)]
        pairs = [(prefix, item) for prefix, items in requests for item in items]

        def call() -> tuple[Any, str]:
            found = self.scorer.predict(pairs, return_usage=True)
            return found.scores, found.usage.flow

        self.run(lambda: self.check("predict", requests, call, is_positive_alone=True))

    @action(data=st.data(), count=st.integers(1, 4), over_labels=st.booleans())
    def score_many(self, data: Any, count: int, over_labels: bool) -> None:
        requests = [self.request(data) for _ in range(count)]

        def call() -> tuple[Any, str]:
            found = self.scorer.score_many(requests, apply_softmax=over_labels, return_usage=True)
            flows = {one.usage.flow for one in found}
            rows = [row for one in found for row in one.scores]
            return rows, flows.pop() if len(flows) == 1 else "mixed"

        self.run(lambda: self.check("score_many", requests, call, over_labels=over_labels))

    @action(data=st.data(), max_items=st.sampled_from((None, 1, 7)))
    def score_stream(self, data: Any, max_items: int | None) -> None:
        prefix, items = self.request(data)

        def call() -> tuple[Any, str]:
            rows = self.scorer.score_stream(prefix, iter(items), max_items=max_items)
            return list(rows), "stream"

        self.run(lambda: self.check("score_stream", [(prefix, items)], call))

    @only_if(lambda self: self.engine != "jax")  # it has pages, and so programs, of its own
    @action(data=st.data())
    def verify(self, data: Any) -> None:
        prefix, items = self.request(data)
        labels = None if self.is_class else PAIR

        def call() -> tuple[Any, str]:
            report = verify_parity(
                self.model,
                samples=[(prefix, items)],
                label_token_ids=labels,
                mask_impl=self.scorer.mask_impl,
                tolerance=self.tolerance(),
                show=False,
            )
            # eager attention is causal whatever it is told
            is_other = self.is_rough or "not_causal" in self.changes
            if report.verdict == "different" and not is_other:
                raise WrongError(f"verify {self.told()}: off by {report.max_abs:.2g}")
            rows = self.scorer.score(prefix, items)
            return rows, "verify"

        self.run(lambda: self.check("verify", [(prefix, items)], call))

    @only_if(lambda self: self.engine != "dense" and not self.is_class)
    @action(data=st.data())
    def through_the_pipeline(self, data: Any) -> None:
        prefix, items = self.request(data)

        def call() -> tuple[Any, str]:
            if self.pipeline is None:
                self.pipeline = MultiItemScoringPipeline(
                    model=self.base, label_token_ids=PAIR, prefix_cache_bytes=self.cache_bytes
                )
            found = self.pipeline({"query": prefix, "items": items}, apply_softmax=True)
            return [[one["scores"][label] for label in PAIR] for one in found], "pipeline"

        if self.base is self.model:  # a pipeline takes no wrapped model
            check = "pipeline", [(prefix, items)], call
            self.run(lambda: self.check(*check, over_labels=True))

    # what is held

    def may_not_hold(self, prefix: Ids, error: Any) -> bool:
        if not isinstance(error, InputError) or "prefix_cache_bytes" not in str(error):
            return False
        pool = engine_of(self.scorer).pool
        room = pool.num_pages - pool.num_pinned_pages if pool else 0
        return cdiv(len(prefix), PAGE_SIZE) > room

    @only_if(lambda self: len(self.held) < 3)
    @action(weight=3, data=st.data())
    def hold(self, data: Any) -> None:
        prefix, _ = self.request(data)
        with self.watched():
            try:
                held = self.scorer.prefix(prefix)
            except Exception as error:
                is_known = self.is_documented(error) or self.may_not_hold(prefix, error)
                if not is_known and str(error) != self.own_failure() and not self.fails_itself():
                    raise LostError(f"prefix {self.told()}: {error!r}") from error
            else:
                self.held.append((held, prefix, self.num_changes))

    @only_if(has("held"))
    @action(weight=2, data=st.data(), which=st.integers(0, 2), over_labels=st.booleans())
    def score_held(self, data: Any, which: int, over_labels: bool) -> None:
        held, prefix, changes = self.held[which % len(self.held)]
        _, items = self.request(data)
        items = [item or [7] for item in items]

        def call() -> tuple[Any, str]:
            found = held.score(items, apply_softmax=over_labels, return_usage=True)
            return found.scores, found.usage.flow

        def is_stale(error: Any) -> bool:
            return isinstance(error, StalePrefixError) and self.num_changes > changes

        options: Any = {"over_labels": over_labels, "may_refuse": is_stale}
        with self.watched():
            self.check("held", [(prefix, items)], call, **options)

    @only_if(has("held"))
    @action(weight=3, which=st.integers(0, 2), is_released=st.booleans())
    def let_one_go(self, which: int, is_released: bool) -> None:
        held, _, _ = self.held.pop(which % len(self.held))
        if is_released:
            held.release()
        del held
        gc.collect(0)

    @only_if(lambda self: self.stream is None)
    @action(data=st.data())
    def open_a_stream(self, data: Any) -> None:
        prefix, items = self.request(data)
        try:
            stream = self.scorer.score_stream(prefix, iter(items), max_items=1)
        except Exception as error:
            if not self.is_documented(error):
                raise LostError(f"stream {self.told()}: {error!r}") from error
        else:
            self.stream = stream, (prefix, items), 0

    @only_if(has("stream"))
    @action(count=st.integers(1, 3), then_drop=st.booleans())
    def take_from_the_stream(self, count: int, then_drop: bool) -> None:
        """Each row is a launch of its own, of the model as it is then."""
        stream, (prefix, items), at = self.stream or (None, ([], []), 0)
        taken = items[at : at + count]
        is_whole = False
        if taken:
            with self.watched():
                is_whole = self.check(
                    "open stream",
                    [(prefix, taken)],
                    lambda: ([next(stream) for _ in taken], "stream"),
                )
        self.stream = None
        if is_whole and not then_drop:
            self.stream = stream, (prefix, items), at + count

    # what changes

    def make_a_change(self, name: str, looks: bool = False, stays: bool = True) -> None:
        """A change, perhaps the last call once more, and perhaps the change taken back."""
        step, before = STEPS[name], what_runs(self.model)
        if not step.fits(self.model):
            return
        try:
            with self.watched():
                step.make(self.model)
        except RuntimeError as error:
            if "nference" not in str(error):
                raise
            return  # what torch does not do to tensors of inference mode
        self.changed(name, step.refused)
        self.look_again(looks)
        if not stays:
            put_back(before)
            self.changed(f"{name} taken back")
            self.look_again(looks)

    def look_again(self, looks: bool = True) -> None:
        if looks and self.last:
            self.last()

    @action(weight=3, name=st.sampled_from(VALUES), looks=MOSTLY)
    def change_values(self, name: str, looks: bool) -> None:
        self.make_a_change(name, looks)

    @action(weight=3, name=st.sampled_from(MODULES), looks=MOSTLY)
    def change_modules(self, name: str, looks: bool) -> None:
        self.make_a_change(name, looks)

    @action(name=st.sampled_from(ADAPTERS), looks=MOSTLY)
    def change_adapters(self, name: str, looks: bool) -> None:
        self.make_a_change(name, looks)

    @action(weight=3, name=st.sampled_from(OTHERS), looks=MOSTLY, is_taken_back=MOSTLY)
    def change_what_runs(self, name: str, looks: bool, is_taken_back: bool) -> None:
        self.make_a_change(name, looks, stays=not is_taken_back)

    @action()
    def train_and_eval(self) -> None:
        self.changed("train_and_eval")
        self.model.train()
        self.check_refused(InputError, "is in train mode")
        self.model.eval()
        self.look_again()

    @action()
    def train_a_part(self) -> None:
        part = part_with_dropout(layers_of(self.model)[0])
        self.changed("train_a_part", PLAIN)
        part.train()
        self.check_refused(InputError, "is in train mode")
        part.eval()
        self.look_again()

    @action()
    def unpatch_and_patch(self) -> None:
        if self.engine == "dense":
            patch_model(self.model)  # which it need not be
        unpatch_model(self.model)
        self.changed("unpatch_and_patch")
        if self.engine == "dense":
            return
        self.check_refused(NotPatchedError, "model is not patched")
        try:
            patch_model(self.model, device=self.device)
        except Exception as error:
            if not any(text in str(error) for text in self.refusals):
                raise LostError(f"patch {self.told()}: {error!r}") from error
            self.ledger.refused[type(error).__name__] += 1

    @action(weight=2, is_pickled=st.booleans(), data=st.data())
    def go_on_with_a_copy(self, is_pickled: bool, data: Any) -> None:
        """Also as in a process that has patched nothing."""
        before = self.scorer
        try:
            copied: Any = pickle.dumps(before) if is_pickled else copy.deepcopy(before)
        except (AttributeError, TypeError, pickle.PicklingError):
            return  # of hooks that are no module's
        except RuntimeError as error:
            if "parametrized" in str(error):
                return  # which torch cannot pickle
            raise
        self.let_go()
        if is_pickled:
            for name in REGISTERED_NAMES.values():
                AttentionInterface._global_mapping.pop(name, None)
            copied = pickle.loads(copied)
        self.scorer = copied
        self.changed("pickled" if is_pickled else "copied")
        self.score(data, over_labels=True, autocast=False, flow=None)

    @only_if(lambda self: not self.is_class)
    @action(length=st.integers(1, 70))
    def generate(self, length: int) -> None:
        given = torch.tensor([prefix_of((0, length, 0))])
        options: Any = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        with self.watched():
            try:
                want = self.plain().generate(input_ids=given, **options)
            except Exception:
                return  # the model itself cannot
            try:
                found = self.model.generate(input_ids=given, **options)
            except RuntimeError as error:
                if "nference" not in str(error):
                    raise
                return  # nor can it with tensors of inference mode, which a copy has not
        if not torch.equal(found, want):
            raise WrongError(f"generate {self.told()}: {found.tolist()} and not {want.tolist()}")
        self.ledger.calls["generate", self.engine] += 1

    @only_if(has("last"))
    @action(times=st.sampled_from((1, 1, 3)))
    def once_more(self, times: int) -> None:
        """The same call; the third compiles nothing, for its prefix is in pages."""
        last, counts = self.last, []
        for _ in range(times):
            with self.watched():
                last()
            program = program_of(self.base)
            counts.append(program.compile_count if program else 0)
        if times == 3 and counts[2] > counts[1]:
            raise BooksError(f"{self.told()}: programs made ready are {counts}")

    @rule(data=st.data())
    def step(self, data: Any) -> None:
        possible = [name for name in ACTIONS if getattr(self, name).when(self)]
        chosen = getattr(self, data.draw(st.sampled_from(possible), "action"))
        chosen(**{key: data.draw(of, key) for key, of in chosen.given.items()})

    @invariant()
    def pages_are_accounted_for(self) -> None:
        if hasattr(self, "scorer"):
            self.check_pages()

    def teardown(self) -> None:
        if hasattr(self, "scorer"):
            self.let_go()
            self.check_pages()
