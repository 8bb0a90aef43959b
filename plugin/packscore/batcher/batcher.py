"""Concurrent calls, merged into launches by one device thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from packscore.batcher.stats import BatcherStats
from packscore.batcher.waiting import Call, Turn, Waiting
from packscore.core import ScoringCore
from packscore.encoded import EncodedRequest
from packscore.errors import (
    BatcherClosedError,
    LaunchError,
    PackscoreError,
    QueueFullError,
    RequestTooLargeError,
)
from packscore.flows.runner import Runner
from packscore.reading.prepared import Prepared

T = TypeVar("T")

MAX_REQUESTS = 1024
MAX_TOKENS = 2**20
WINDOW_SECONDS = 0.003
# What a full queue says before anything ran, and the least and most that it says.
RETRY_SECONDS, LEAST_RETRY, MOST_RETRY = 1.0, 0.1, 60.0


class Batcher:
    """The queue of one scorer: `scorer.batcher`, or `scorer.start_batcher(...)` with other limits.

    Requests wait a few milliseconds for others, or until a launch is full, and run together
    whatever their labels and options are. One thread encodes, one runs launches, one makes results
    of them; event loops only wait.

    Args:
      core: of the scorer.
      max_requests: that may wait.
      max_tokens: of items, that may wait; None is about a million.
      window_seconds: how long the first of an idle queue waits for others.
      max_request_tokens: of one request, its prefix once and its items; None sets no limit.
    """

    def __init__(
        self,
        core: ScoringCore,
        *,
        max_requests: int = MAX_REQUESTS,
        max_tokens: int | None = None,
        window_seconds: float = WINDOW_SECONDS,
        max_request_tokens: int | None = None,
    ) -> None:
        self._core = core
        self._process = os.getpid()
        self.max_requests = max_requests
        self.max_tokens = MAX_TOKENS if max_tokens is None else max_tokens
        self.window_seconds = window_seconds
        self.max_request_tokens = max_request_tokens
        self._changed = threading.Condition()
        self._open: set[Call] = set()  # accepted, and neither done nor left
        self._encoding: set[Call] = set()
        self._waiting = Waiting()
        self._is_stepping = False
        self._is_closed = False
        self._counts: Counter[str] = Counter()
        self._seconds: dict[str, float] = dict.fromkeys(
            ("waiting", "encoding", "running", "finishing"), 0.0
        )
        self._encoder = ThreadPoolExecutor(1, "packscore-encode")
        self._device = ThreadPoolExecutor(1, "packscore-device")
        self._finisher = ThreadPoolExecutor(1, "packscore-finish")

    @property
    def stats(self) -> BatcherStats:
        """What it did so far, and what waits."""
        pool = self._core.engine.pool
        pages = 0 if pool is None else pool.num_pages
        used = 0 if pool is None else pages - pool.num_free_pages
        with self._changed:
            return BatcherStats(
                **self._counts,
                pages=pages,
                used_pages=used,
                queued_requests=self._queued,
                queued_tokens=self._waiting.tokens,
                **{f"{stage}_seconds": spent for stage, spent in self._seconds.items()},
            )

    @property
    def is_ours(self) -> bool:
        """Whether this process made it: the threads of another did not come along."""
        return self._process == os.getpid()

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._is_closed

    @property
    def _queued(self) -> int:
        return len(self._encoding) + len(self._waiting)

    async def submit(self, prepare: Callable[[], Prepared[T]]) -> T:
        """The result of a request, once it ran.

        Args:
          prepare: called in the thread that encodes; what it raises is raised here.

        Raises:
          QueueFullError: too many requests wait, or too many tokens.
          BatcherClosedError: it was closed.
          LaunchError: the launch that it was in failed.
        """
        loop = asyncio.get_running_loop()
        call = Call(prepare, loop, loop.create_future())
        self._accept(call)
        try:
            return cast(T, await call.future)
        finally:
            self._leave(call)

    def _accept(self, call: Call) -> None:
        with self._changed:
            if self._is_closed:
                raise _closed()
            if self._queued >= self.max_requests or self._waiting.tokens >= self.max_tokens:
                self._counts["rejected"] += 1
                raise self._full()
            try:
                self._encoder.submit(self._encode, call)
            except RuntimeError as error:  # the interpreter ends
                raise _closed() from error
            self._counts["accepted"] += 1
            self._open.add(call)
            self._encoding.add(call)

    def _leave(self, call: Call) -> None:
        """Nobody waits for its result: what of it has not run never does."""
        with self._changed:
            if call not in self._open:
                return
            call.is_left = True
            self._open.remove(call)
            self._encoding.discard(call)
            self._waiting.remove(call)
            self._counts.update(cancelled=1, dropped=int(not call.has_run))
            self._changed.notify_all()

    def _full(self) -> QueueFullError:
        ran, seconds = self._counts["computed_tokens"], self._seconds["running"]
        after = RETRY_SECONDS
        if ran and seconds:
            after = min(max(self._waiting.tokens * seconds / ran, LEAST_RETRY), MOST_RETRY)
        return QueueFullError(self._queued, self._waiting.tokens, after)

    def _encode(self, call: Call) -> None:
        if call.is_left:
            return
        start = time.perf_counter()
        try:
            self._core.check_ready()
            prepared = call.prepare()
            self._check_size(prepared.request)
            runner = self._core.runner
            is_kept = not len(prepared.request.prefix) or runner.can_hold(prepared.request.prefix)
            call.is_ready(prepared, now=time.perf_counter(), is_kept=is_kept)
        except Exception as error:
            with self._changed:
                self._seconds["encoding"] += time.perf_counter() - start
                self._encoding.discard(call)
            self._finish([(call, error)])
            return
        with self._changed:
            self._seconds["encoding"] += time.perf_counter() - start
            if call.is_left:
                return
            self._encoding.remove(call)
            is_full = self._waiting.tokens + call.tokens > self.max_tokens
            if not (is_full and len(self._waiting)):
                self._waiting.append(call)
                self._start_step()
                return
            self._counts["rejected"] += 1
            error = self._full()
        self._finish([(call, error)])

    def _check_size(self, request: EncodedRequest) -> None:
        tokens = len(request.prefix) + sum(map(len, request.items))
        if self.max_request_tokens is not None and tokens > self.max_request_tokens:
            raise RequestTooLargeError(
                f"the request has {tokens:,} tokens, over the {self.max_request_tokens:,} that one "
                "may have; send its items in several"
            )

    def _start_step(self) -> None:
        """The device thread has something to do."""
        if self._is_stepping:
            self._changed.notify_all()
            return
        self._is_stepping = True
        self._step_later(is_first=True)

    def _step_later(self, *, is_first: bool) -> None:
        try:
            self._device.submit(self._step, is_first)
        except RuntimeError:  # closed without waiting for it, or the interpreter ends
            self._fail([*self._waiting])

    def _step(self, is_first: bool) -> None:
        """Run what fits into a launch, then again for as long as something waits."""
        runner = self._runner()
        limits = runner.engine.limits
        with self._changed:
            if is_first:
                self._wait_for_more(limits.target_tokens)
            turns = self._waiting.take(
                limits.target_tokens,
                limits.max_groups,
                lambda prefix: len(prefix) - runner.cached_len(prefix),
            )
            now = time.perf_counter()
            for turn in turns:
                if not turn.call.has_run:
                    self._seconds["waiting"] += now - turn.call.ready_at
                turn.call.has_run = True
        if turns:
            self._run(runner, turns)
        with self._changed:
            self._changed.notify_all()
            self._is_stepping = len(self._waiting) > 0
            if self._is_stepping:
                self._step_later(is_first=False)

    def _wait_for_more(self, full: int) -> None:
        end = time.perf_counter() + self.window_seconds
        while self._waiting.tokens < full and not self._is_closed:
            left = end - time.perf_counter()
            if left <= 0:
                break
            self._changed.wait(left)

    def _runner(self) -> Runner:
        return Runner(self._core.engine, launching=self._count_launch)

    def _count_launch(self) -> None:
        with self._changed:
            self._counts["launches"] += 1

    def _run(self, runner: Runner, turns: list[Turn]) -> None:
        start = time.perf_counter()
        try:
            self._core.check_ready()
            found = self._core.run(
                [turn.request for turn in turns], [turn.read for turn in turns], runner=runner
            )
        except Exception as error:
            found = [error for _ in turns]
        ended: list[tuple[Call, Any]] = []
        with self._changed:
            self._counts["runs"] += 1
            self._seconds["running"] += time.perf_counter() - start
            for turn, one in zip(turns, found, strict=True):
                call = turn.call
                if isinstance(one, Exception):
                    self._waiting.remove(call)
                    is_own = isinstance(one, PackscoreError)
                    ended.append((call, one if is_own else LaunchError.of(one)))
                    continue
                self._count_usage(call, one.usage)
                call.found.append(one)
                if call.is_taken and len(call.found) == len(call.parts):
                    ended.append((call, None))
            self._counts["ran"] += len(ended)
        try:
            self._finisher.submit(self._finish, ended)
        except RuntimeError:  # as in `_step_later`
            self._finish(ended)

    def _count_usage(self, call: Call, usage: Any) -> None:
        self._counts.update(
            computed_tokens=usage.computed_tokens,
            saved_tokens=usage.prefix_tokens_saved,
            cached_tokens=usage.cached_tokens,
            padding_tokens=usage.padding_tokens,
            prefix_hits=int(not call.found and usage.cached_tokens > 0),
        )

    def _finish(self, ended: Iterable[tuple[Call, Any]]) -> None:
        """Make results of what was read, and hand them to those who wait."""
        start = time.perf_counter()
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
        for call, result in ended:
            if call.is_left:
                continue
            if not isinstance(result, Exception):
                assert call.prepared is not None
                try:
                    result = call.prepared.finish(call.whole())
                except Exception as error:
                    result = error
            with self._changed:
                if call not in self._open:
                    continue
                self._open.remove(call)
                is_error = isinstance(result, Exception)
                self._counts["failed" if is_error else "answered"] += 1
            by_loop.setdefault(call.loop, []).append((call.future, result))
        for loop, results in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(_deliver, results)
        with self._changed:
            self._seconds["finishing"] += time.perf_counter() - start
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> bool:
        """Finish what was accepted and refuse the rest; then its threads end.

        Args:
          timeout: seconds after which what still waits fails; None waits for all of it.

        Returns:
          Whether all of it was finished.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            is_done = self._changed.wait_for(lambda: not self._open, timeout)
            self._fail([*self._encoding, *self._waiting])
        for pool in (self._encoder, self._device, self._finisher):
            pool.shutdown(wait=is_done)
        return is_done

    def _fail(self, calls: list[Call]) -> None:
        """What does not run any more."""
        for call in calls:
            self._encoding.discard(call)
            self._waiting.remove(call)
        self._finish([(call, _closed()) for call in calls])

    async def aclose(self, timeout: float | None = None) -> bool:
        """`close`, while the event loop goes on."""
        return await asyncio.to_thread(self.close, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


def _closed() -> BatcherClosedError:
    return BatcherClosedError(
        "the batcher is closed and takes no more requests; start another with "
        "scorer.start_batcher()"
    )


def _deliver(results: list[tuple[asyncio.Future[Any], Any]]) -> None:
    """In the event loop of those who wait."""
    for future, result in results:
        if future.done():  # cancelled meanwhile
            continue
        if isinstance(result, StopIteration):  # which no future takes
            result = RuntimeError(repr(result))
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
