"""One process that listens: uvicorn, stopped so that every accepted request is answered."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from packscore.serve.state import State


class Server(uvicorn.Server):
    """Stops in three steps: it says that it is not ready, takes no more, and answers the rest.

    A second signal ends the first step at once, a third one all waiting.

    Args:
      app: of `create_app`.
      listener: bound, and not yet listening.
      drain_seconds: of the first step, in which new requests are refused and told why.
      listening: called when it does.
    """

    def __init__(
        self,
        app: FastAPI,
        listener: socket.socket,
        drain_seconds: float,
        listening: Callable[[], None] = lambda: None,
    ) -> None:
        # log_config: what the application logs and how is for who runs it to say
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=False, server_header=False)
        )
        self._state: State = app.state.packscore
        self._listener = listener
        self._drain_seconds = drain_seconds
        self._leave_at = float("inf")
        self._listening = listening

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; the signal is not raised again at the end, which is a good one."""
        if self.should_exit:
            self.force_exit = True
        elif self._state.draining:
            self.should_exit = True
        self._state.draining = True
        self._leave_at = min(self._leave_at, time.monotonic() + self._drain_seconds)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._listening()

    async def on_tick(self, counter: int) -> bool:
        """Whether the first step is over."""
        return await super().on_tick(counter) or time.monotonic() >= self._leave_at

    def run_until_stopped(self) -> None:
        """Listen, until a signal comes and all that was accepted is answered."""
        asyncio.run(self._until_stopped())

    async def _until_stopped(self) -> None:
        await self.serve([self._listener])
        for scorer in self._state.models.scorers.values():
            await scorer.batcher.aclose()


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet, so that nobody waits while models load.

    Raises:
      OSError: the address is taken, or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    listener.set_inheritable(True)
    return listener


def log_to_stderr(*, quiet: bool) -> None:
    """Lines of requests, and of failed launches, as they are: JSON, and text."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("packscore.serve")
    root.addHandler(handler)
    root.setLevel(logging.WARNING if quiet else logging.INFO)
    root.propagate = False
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
