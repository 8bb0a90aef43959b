"""A server between a client and `packscore serve` that keeps what went through, over loopback."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from clients import wire

# others tell of the machine, or are a key
KEPT = {"accept", "content-encoding", "content-type", "user-agent", "x-client-name"}


class Exchanges(list[dict[str, Any]]):
    """Requests, in order."""


@contextmanager
def between(server_port: int) -> Iterator[tuple[str, Exchanges]]:
    """The root URL that clients are given, and what they have sent."""
    kept = Exchanges()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            there = http.client.HTTPConnection("127.0.0.1", server_port, timeout=60)
            there.request(self.command, self.path, body, dict(self.headers.items()))
            answer = there.getresponse()
            told = answer.read()
            there.close()
            headers = {k.lower(): v for k, v in self.headers.items() if k.lower() in KEPT}
            asked = {"method": self.command, "path": self.path, "headers": headers}
            kept.append(asked | {"body": wire.unpacked(headers, body)})
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("content-length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def do_GET(self) -> None:
            self._pass_on()

        def do_POST(self) -> None:
            self._pass_on()

        def log_message(self, *_: Any) -> None:
            pass

    here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=here.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{here.server_port}", kept
    finally:
        here.shutdown()
        here.server_close()
        thread.join()
