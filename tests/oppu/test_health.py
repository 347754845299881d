"""Liveness, readiness and the HTTP server that tells of them; logging as a process sets it."""

import io
import json
import logging
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from oppu.clock import ManualClock
from oppu.errors import ConfigError
from oppu.health import START, Health, Server, serve
from oppu.logs import configure_logging
from oppu.metrics import Metrics, fresh
from oppu.settings import ServiceSettings


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def health(clock: ManualClock) -> Health:
    return Health(clock, live_within_seconds=10)


@pytest.fixture
def metrics() -> Metrics:
    return fresh()


@pytest.fixture
def server(health: Health, metrics: Metrics) -> Iterator[Server]:
    server = serve("127.0.0.1", 0, metrics.registry, health)
    yield server
    server.close()


def _get(server: Server, path: str, *, method: str = "GET") -> tuple[int, str, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, response.headers["Content-Type"], response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read()


def test_live_while_the_work_advances(health: Health, clock: ManualClock) -> None:
    clock.advance(10)
    assert health.is_live()
    clock.advance(0.1)
    assert not health.is_live()
    health.alive()
    assert health.is_live()


def test_live_while_it_starts_however_long_and_counted_from_then_on(health: Health, clock: ManualClock) -> None:
    health.not_ready(START, "starting")
    clock.advance(1000)
    assert health.is_live() and not health.is_ready()
    health.ready(START)
    clock.advance(10)
    assert health.is_live() and health.is_ready()
    clock.advance(0.1)
    assert not health.is_live()


def test_a_jump_of_the_wall_clock_is_no_death(health: Health, clock: ManualClock) -> None:
    clock.jump(86_400)
    assert health.is_live()


def test_ready_when_no_part_objects(health: Health) -> None:
    assert health.is_ready()
    health.not_ready("loop", "starting")
    health.not_ready("model", "loading")
    health.ready("loop")
    assert health.reasons() == {"model": "loading"}
    health.ready("model")
    assert health.is_ready()


def test_healthz(server: Server, clock: ManualClock) -> None:
    assert _get(server, "/healthz") == (200, "application/json", b'{"live": true}\n')
    clock.advance(11)
    assert _get(server, "/healthz") == (503, "application/json", b'{"live": false}\n')


def test_readyz_says_why_not(server: Server, health: Health) -> None:
    assert _get(server, "/readyz")[0] == 200
    health.not_ready("loop", "retrying after OffsetConflict")
    status, _, body = _get(server, "/readyz")
    assert status == 503
    assert json.loads(body) == {"ready": False, "reasons": {"loop": "retrying after OffsetConflict"}}


def test_metrics_parse_and_carry_values(server: Server, metrics: Metrics) -> None:
    metrics.lag.labels("ingest", "events", "0").set(7)
    status, content_type, body = _get(server, "/metrics?name=ignored")
    assert (status, content_type.split(";")[0]) == (200, "text/plain")
    samples = {s.name: s.value for family in text_string_to_metric_families(body.decode()) for s in family.samples}
    assert samples["oppu_worker_lag_records"] == 7


def test_unknown_paths_are_404(server: Server) -> None:
    assert _get(server, "/")[0] == 404
    assert _get(server, "/metrics/x")[0] == 404


def test_head_has_no_body(server: Server) -> None:
    status, _, body = _get(server, "/healthz", method="HEAD")
    assert (status, body) == (200, b"")


def test_other_methods_are_refused(server: Server) -> None:
    assert _get(server, "/metrics", method="POST")[0] == 501


def test_a_silent_peer_does_not_hold_up_others_or_the_end(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)):
        assert _get(server, "/healthz")[0] == 200
        server.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


def test_closing_leaves_no_thread(health: Health, metrics: Metrics) -> None:
    server = serve("127.0.0.1", 0, metrics.registry, health)
    assert any(thread.name == "oppu-http" for thread in threading.enumerate())
    server.close()
    assert not any(thread.name == "oppu-http" for thread in threading.enumerate())


def test_a_taken_port_is_a_configuration_error(server: Server, health: Health, metrics: Metrics) -> None:
    with pytest.raises(ConfigError, match=r"service\.metrics_port: cannot listen on 127\.0\.0\.1"):
        serve("127.0.0.1", server.port, metrics.registry, health)


def test_a_host_that_is_not_ours_is_a_configuration_error(health: Health, metrics: Metrics) -> None:
    with pytest.raises(ConfigError, match=r"service\.metrics_host"):
        serve("256.0.0.1", 0, metrics.registry, health)


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def _lines(settings: ServiceSettings) -> list[str]:
    stream = io.StringIO()
    configure_logging(settings, stream)
    logger = logging.getLogger("oppu.somewhere")
    logger.info("partition %d\nat %s", 3, "é")
    logger.debug("hidden")
    try:
        raise ValueError("inner")
    except ValueError:
        logger.exception("it failed")
    logging.getLogger("kafka.conn").info("chatter")
    return stream.getvalue().splitlines()


def test_json_logs_are_one_object_a_line(root_logger: logging.Logger) -> None:
    lines = [json.loads(line) for line in _lines(ServiceSettings(log_format="json"))]
    assert [line["message"] for line in lines] == ["partition 3\nat é", "it failed"]
    assert (lines[0]["level"], lines[0]["logger"]) == ("INFO", "oppu.somewhere")
    assert lines[0]["time"].endswith("+00:00")
    assert "ValueError: inner" in lines[1]["exception"]


def test_plain_logs_are_for_people(root_logger: logging.Logger) -> None:
    lines = _lines(ServiceSettings())
    assert "INFO    oppu.somewhere: partition 3" in lines[0]
    assert any("ValueError: inner" in line for line in lines)
    assert not any("chatter" in line or "hidden" in line for line in lines)


def test_a_second_configuration_replaces_the_first(root_logger: logging.Logger) -> None:
    configure_logging(ServiceSettings(), io.StringIO())
    stream = io.StringIO()
    configure_logging(ServiceSettings(log_level="WARNING"), stream)
    assert len(root_logger.handlers) == 1
    logging.getLogger("oppu.x").warning("once")
    logging.getLogger("oppu.x").info("not at all")
    assert stream.getvalue().count("\n") == 1
