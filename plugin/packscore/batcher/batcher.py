"""Concurrent calls, merged into launches by a device thread for each copy of the model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from packscore.batcher.outcomes import closed, deliver, fault_of, own
from packscore.batcher.stats import BatcherStats, Counters
from packscore.batcher.waiting import Call, Turn, Waiting, check_size, is_long
from packscore.core import ScoringCore
from packscore.errors import PackscoreError, QueueFullError
from packscore.flows.runner import Runner
from packscore.inputs import check_count
from packscore.model.weight_watch import WeightWatch
from packscore.reading.prepared import Prepared

T = TypeVar("T")

MAX_REQUESTS = 1024
MAX_TOKENS = 2**20
WINDOW_SECONDS = 0.003
# Results of a run that take longer to make are handed out as they come.
HAND_OUT_SECONDS = 0.002
# Held while a scorer gets its batcher, so that it gets one.
STARTING = threading.Lock()


class Batcher:
    """The queue of one scorer: `scorer.batcher`, or `scorer.start_batcher(...)` with other limits.

    Requests wait a few milliseconds for others, or until a launch is full, and run together,
    whatever their labels and options are. One thread encodes (and one what is long), one a copy of
    the model runs launches, one makes results of what was read; event loops only wait. With nothing
    to do the threads hold nothing, and they end with the scorer.

    Args:
      core: of the scorer.
      max_requests: how many may wait.
      max_tokens: how many tokens of items may wait; None is about a million.
      window_seconds: how long the first request of an idle queue waits for others.
      max_request_tokens: of one request, its prefix once and its items; None sets no limit.

    Raises:
      InputError: a limit is out of range.
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
        check_count("max_tokens", max_tokens)
        check_count("max_request_tokens", max_request_tokens)
        self._core = core
        self._process = os.getpid()
        self.max_requests = max_requests
        self.max_tokens = MAX_TOKENS if max_tokens is None else max_tokens
        self.window_seconds = window_seconds
        self.max_request_tokens = max_request_tokens
        # holds all that follows; its lock may be taken again by who has it
        self._changed = threading.Condition()
        self._open: set[Call] = set()  # accepted, and neither done nor left
        self._encoding: set[Call] = set()
        self._waiting = Waiting()
        self._is_gathering = False  # one device thread takes what runs next
        self._num_running = 0  # others run what they took
        self._num_threads = core.num_copies
        self._is_closed = False
        self._counters = Counters()
        self._encoder = ThreadPoolExecutor(1, "packscore-encode")
        self._long_encoder = ThreadPoolExecutor(1, "packscore-encode-long")
        self._device = ThreadPoolExecutor(self._num_threads, "packscore-device")
        self._finisher = ThreadPoolExecutor(1, "packscore-finish")

    @property
    def stats(self) -> BatcherStats:
        """What it did so far, and what waits."""
        pools = self._core.copies.pools
        with self._changed:
            return self._counters.stats(self._queued, self._waiting.tokens, pools)

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._is_closed

    @property
    def is_ours(self) -> bool:
        """Whether this process made it: the threads of another did not come along."""
        return self._process == os.getpid()

    @property
    def _queued(self) -> int:
        return len(self._encoding) + len(self._waiting)

    async def submit(self, prepare: Callable[[], Prepared[T]], given: Any = ()) -> T:
        """The result of a request, once it ran.

        Args:
          prepare: called in a thread that encodes; what it raises is raised here.
          given: the texts that it encodes, in lists and dicts; long ones have their own thread.

        Raises:
          QueueFullError: too many requests wait, or too many tokens.
          BatcherClosedError: it was closed.
          LaunchError: the launch that it was in failed.
        """
        loop = asyncio.get_running_loop()
        call = Call(prepare, given, loop, loop.create_future())
        self._accept(call)
        try:
            return cast(T, await call.future)
        finally:
            self._leave(call)
            del call  # an error holds this frame, and the call the error

    def _accept(self, call: Call) -> None:
        with self._changed:
            if self._is_closed:
                raise closed()
            if self._queued >= self.max_requests or self._waiting.tokens >= self.max_tokens:
                self._counters.add(rejected=1)
                raise self._full()
            self._open.add(call)
            self._encoding.add(call)
            try:
                self._encoder.submit(self._encode, call)
            except RuntimeError as error:  # the interpreter ends
                self._open.remove(call)
                self._encoding.remove(call)
                raise closed() from error
            self._counters.add(accepted=1)

    def _leave(self, call: Call) -> None:
        """Nobody waits for its result any more: what of it has not run never does."""
        with self._changed:
            if call not in self._open:
                return
            self._open.remove(call)
            self._unqueue(call)
            self._counters.add(cancelled=1, dropped=int(not call.has_run))
            self._changed.notify_all()

    def _unqueue(self, call: Call) -> None:
        self._encoding.discard(call)
        self._waiting.remove(call)

    def _full(self) -> QueueFullError:
        tokens = self._waiting.tokens
        wait = self._counters.retry_after(tokens, self._num_threads)
        return QueueFullError(self._queued, tokens, wait)

    # In the threads that encode.

    def _encode(self, call: Call, is_apart: bool = False) -> None:
        if call not in self._open:
            return
        error: BaseException | None = None
        with self._counters.timed("encoding"):
            try:
                if not is_apart and is_long(call.given):
                    self._long_encoder.submit(self._encode, call, True)
                    return
                self._core.check_ready()
                prepared = call.prepare()
                check_size(prepared.request, self.max_request_tokens)
                prefix = prepared.request.prefix
                is_kept = not len(prefix) or self._core.runner.can_hold(prefix)
                call.encoded(prepared, is_kept=is_kept)
            except BaseException as found:  # a task waits for it, whatever it is
                error = found
        with self._changed:
            if call not in self._open:
                return
            self._encoding.discard(call)
            has_room = self._waiting.tokens + call.tokens <= self.max_tokens
            if error is None and (has_room or not len(self._waiting)):
                self._waiting.append(call)
                self._wake()
                return
            if error is None:
                error = self._full()
        self._finish([(call, error)])

    def _wake(self) -> None:
        """There is something to do, for a device thread that has nothing."""
        if self._is_gathering:
            self._changed.notify_all()
        elif self._num_running < self._num_threads:
            self._step_later(is_first=True)

    def _step_later(self, *, is_first: bool) -> None:
        self._is_gathering = True
        try:
            self._device.submit(self._step, is_first)
        except RuntimeError:  # the interpreter ends
            self._fail([*self._waiting])

    # In the device threads.

    def _step(self, is_first: bool) -> None:
        """Run what fits into a launch, then again for as long as something waits."""
        turns: list[Turn] = []
        changed: set[Call] = set()
        try:
            try:
                runner = Runner(self._core.copies, launching=self._count_launch, retries=False)
                turns = self._next_turns(runner, is_first)
            finally:
                self._pass_on(num_more=1)
            with self._counters.timed("running"):
                found = self._run(runner, turns)
                changed = {turn.call for turn in turns if turn.call.sees_change(self._core.model)}
        except BaseException as error:
            found = [own(error) for _ in turns]
            if not turns:  # there is no engine
                self._fail([*self._waiting], error)
        ended = self._sorted_out(turns, found, changed)
        if ended:
            try:
                self._finisher.submit(self._finish, ended)
            except RuntimeError:  # the interpreter ends, or the batcher was closed too soon
                self._finish(ended)
        self._pass_on(num_more=-1)

    def _pass_on(self, *, num_more: int) -> None:
        """So many threads more run; what waits is for one that does not."""
        with self._changed:
            self._num_running += num_more
            self._is_gathering &= num_more < 0
            is_idle = not self._is_gathering and self._num_running < self._num_threads
            if is_idle and len(self._waiting):
                self._step_later(is_first=False)

    def _next_turns(self, runner: Runner, is_first: bool) -> list[Turn]:
        limits = runner.copies.limits
        with self._changed:
            end = time.perf_counter() + self.window_seconds
            while is_first and not (self._is_closed or self._waiting.fill(limits)):
                left = end - time.perf_counter()
                if left <= 0:
                    break
                self._changed.wait(left)
            turns = self._waiting.take(limits, lambda x: len(x) - runner.cached_len(x))
            now = time.perf_counter()
            for turn in turns:
                if not turn.call.has_run:
                    self._counters.add_seconds("waiting", now - turn.call.ready_at)
                turn.call.has_run = True
        return turns

    def _count_launch(self) -> None:
        self._counters.add(launches=1)

    def _run(self, runner: Runner, turns: list[Turn]) -> list[Any]:
        if not turns:  # all were cancelled
            return []
        self._core.check_ready()
        for turn in turns:
            if not turn.is_whole and turn.call.watch is None:
                watch = WeightWatch(self._core.model)
                with self._changed:  # of the part that came first
                    turn.call.watch = turn.call.watch or watch
        requests, reads = [turn.request for turn in turns], [turn.read for turn in turns]
        return self._core.run(requests, reads, runner=runner)

    def _sorted_out(
        self, turns: list[Turn], found: list[Any], changed: set[Call]
    ) -> list[tuple[Call, Any]]:
        """Calls that have run to their end, and the error that they met, or None."""
        ended: list[tuple[Call, Any]] = []
        with self._changed:
            for turn, one in zip(turns, found, strict=True):
                call, has_failed = turn.call, isinstance(one, Exception)
                if not has_failed:
                    self._counters.add_usage(one.usage, is_first=not turn.number)
                if not turn.is_wanted:
                    continue
                if has_failed:
                    self._unqueue(call)
                    call.end()
                    ended.append((call, one if isinstance(one, PackscoreError) else fault_of(one)))
                    continue
                turn.found[turn.number] = one
                if call in changed:  # no result is of two models
                    self._unqueue(call)
                    call.start_over()
                    if call in self._open:
                        self._waiting.append(call)
                elif call.is_done:
                    ended.append((call, None))
            self._counters.add(runs=int(bool(turns)), ran=len(ended))
        return ended

    # In the thread that makes results.

    def _finish(self, ended: Iterable[tuple[Call, Any]]) -> None:
        """Make results of what was read, and hand them to those who wait."""
        done: list[tuple[Call, Any]] = []
        with self._counters.timed("finishing"):
            since = time.perf_counter()
            for call, result in ended:
                if call not in self._open:
                    continue
                try:
                    result = result or call.result()
                except BaseException as error:  # whatever a head of the user's raises
                    result = error
                done.append((call, result))
                if time.perf_counter() - since > HAND_OUT_SECONDS:
                    self._hand_out(done)
                    done, since = [], time.perf_counter()
            self._hand_out(done)

    def _hand_out(self, done: list[tuple[Call, Any]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Call, Any]]] = {}
        with self._changed:
            for call, result in done:
                if call not in self._open:
                    continue
                self._open.remove(call)
                by_loop.setdefault(call.loop, []).append((call, result))
                if isinstance(result, QueueFullError):
                    self._counters.add(accepted=-1, rejected=1)
                elif isinstance(result, BaseException):
                    self._counters.add(failed=1)
                else:
                    self._counters.add(answered=1)
            self._changed.notify_all()
        for loop, results in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(deliver, results)

    # Where it ends.

    def close(self, timeout: float | None = None) -> bool:
        """Finish what was accepted and refuse the rest; then its threads end.

        Args:
          timeout: seconds after which what still waits fails, and what runs is not waited for;
            None waits for all of it.

        Returns:
          Whether all of it was finished.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            is_done = self._changed.wait_for(lambda: not self._open, timeout)
            self._fail([*self._encoding, *self._waiting])
        for pool in (self._encoder, self._long_encoder, self._device, self._finisher):
            pool.shutdown(wait=is_done)
        return is_done

    def _fail(self, calls: list[Call], error: BaseException | None = None) -> None:
        """What waits is not run."""
        with self._changed:
            for call in calls:
                self._unqueue(call)
        self._finish([(call, own(error or closed())) for call in calls])

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
