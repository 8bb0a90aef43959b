"""One process that listens: uvicorn, stopped so that every accepted request is answered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from packscore.serve.state import State

# how long a connection has for a request that its client sent already
READ_SECONDS = 0.5
# how long an idle connection stays: longer than in a proxy, which then is who closes it
KEEP_SECONDS = 75


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
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_SECONDS,
            )
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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, but those that the system took already and nobody read."""
        taken: list[socket.socket] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                taken.append(self._listener.accept()[0])
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        for connection in taken:
            await loop.connect_accepted_socket(self._protocol, connection)
        await asyncio.sleep(READ_SECONDS)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        # Any: uvicorn types the class of its protocols as one of asyncio's, without arguments
        protocol: Any = self.config.http_protocol_class
        made: asyncio.Protocol = protocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

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


class Lines(logging.Formatter):
    """Every record as one line of JSON; those of requests are one already."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        message = record.getMessage()
        if record.name == "packscore.serve.access":
            return message
        found = {"level": record.levelname.lower(), "message": message}
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found)


def log_to_stderr(*, quiet: bool) -> None:
    """Lines of requests, unless it is quiet, and of what went wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    for name, level in (
        ("packscore.serve", logging.WARNING if quiet else logging.INFO),
        ("uvicorn", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
