"""What a worker tells the outside: liveness, readiness with reasons, and its metrics, over a small HTTP server.

Live means that the loop advanced lately, whatever broker and store do, or has not begun: loading a model may take
any time, and a restart would only begin it again. Ready means that no named part has said ``not_ready``. Invariant:
serving a request never waits for the worker's own thread.
"""

import json
import logging
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6, AddressFamily
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from oppu.clock import Clock
from oppu.errors import ConfigError

logger = logging.getLogger(__name__)

START = "start"
"""The part that is not ready until the worker is built."""
REQUEST_SECONDS = 10.0
"""A scrape is one short line and its answer; a peer that takes longer is not reading."""


class Health:
    """Liveness and readiness of one process; every method may be called from any thread."""

    def __init__(self, clock: Clock, *, live_within_seconds: float) -> None:
        self._clock = clock
        self._live_within = live_within_seconds
        self._lock = threading.Lock()
        self._alive_at = clock.monotonic()
        self._reasons: dict[str, str] = {}

    def alive(self) -> None:
        """Note that the work advanced."""
        with self._lock:
            self._alive_at = self._clock.monotonic()

    def ready(self, part: str) -> None:
        """Say that a part can do its work; with :data:`START` liveness begins to count."""
        with self._lock:
            self._reasons.pop(part, None)
            if part == START:
                self._alive_at = self._clock.monotonic()

    def not_ready(self, part: str, reason: str) -> None:
        """Say that a part cannot do its work for now.

        Args:
            part: Its name, such as ``loop``.
            reason: Shown by ``/readyz``; never a payload.
        """
        with self._lock:
            self._reasons[part] = reason

    def is_live(self) -> bool:
        """Tell whether the work advanced within the limit, or has yet to start."""
        with self._lock:
            return START in self._reasons or self._clock.monotonic() - self._alive_at <= self._live_within

    def is_ready(self) -> bool:
        """Tell whether every part is ready."""
        with self._lock:
            return not self._reasons

    def reasons(self) -> dict[str, str]:
        """Return why each part that is not ready is not."""
        with self._lock:
            return dict(self._reasons)


class Server:
    """A running HTTP server, in threads of its own."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="oppu-http", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on, also where 0 was asked for."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop listening; running answers are not waited for."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve(host: str, port: int, registry: CollectorRegistry, health: Health) -> Server:
    """Serve ``/metrics``, ``/healthz`` and ``/readyz``.

    Args:
        host: Address to bind; loopback unless somebody decided otherwise.
        port: Port; 0 picks a free one.
        registry: What ``/metrics`` shows.
        health: What the other two show.

    Returns:
        The running server.

    Raises:
        ConfigError: The address cannot be bound.
    """
    handler = type("_BoundHandler", (_Handler,), {"registry": registry, "health": health})
    server_class = _Server6 if ":" in host else _Server
    try:
        return Server(server_class((host, port), handler))
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"service.metrics_host, service.metrics_port: cannot listen on {host} port {port}: {error}"
        ) from error


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a scrape broke off", exc_info=True)


class _Server6(_Server):
    address_family: AddressFamily = AF_INET6


class _Handler(BaseHTTPRequestHandler):
    registry: CollectorRegistry
    health: Health
    timeout = REQUEST_SECONDS
    server_version = "oppu"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer by path."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._send(HTTPStatus.OK, content_type, encode(self.registry))
        elif path == "/healthz":
            live = self.health.is_live()
            self._json(ok=live, body={"live": live})
        elif path == "/readyz":
            reasons = self.health.reasons()
            self._json(ok=not reasons, body={"ready": not reasons, "reasons": reasons})
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"try /metrics, /healthz or /readyz\n")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Keep a line a scrape out of the logs."""
        logger.debug(format, *args)

    def _json(self, *, ok: bool, body: dict[str, object]) -> None:
        status = HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE
        self._send(status, "application/json", json.dumps(body, sort_keys=True).encode() + b"\n")

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
