"""The real stack under a real Prometheus: every panel and every rule shows something, and labels stay few and tame.

An alert's expression rightly returns nothing while all is well, so its comparisons are asked with ``bool``: they then
keep every series and say 0 or 1, and an alert about a metric that nobody shows has still no answer.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from oppu.cli import Session, compose
from oppu.cli.demo import read_sample
from oppu.cli.up import Stack, stack
from oppu.client import Client
from oppu.store.port import HistoryStore
from oppu.values import OutRecord, UserId
from oppu.wire import BehaviorEvent, PredictionRequest, RequestOptions

pytestmark = [pytest.mark.kafka, pytest.mark.prometheus, pytest.mark.slow, pytest.mark.timeout(600)]

DEPLOY = Path(__file__).parents[2] / "deploy"
ADDRESS_FILES = {"ingest": "ingest.url", "updater": "updater.url", "inference": "inference-0.url"}
USERS, FIRST, SECOND, ASKED = 6, 24, 10, 2
ARMS = {
    "all": RequestOptions(),
    "retrieval": RequestOptions(profile=False, adapter=False),
    "adapter": RequestOptions(retrieve=0, profile=False),
    "none": RequestOptions(retrieve=0, profile=False, adapter=False),
}
OVERRIDES = """
[model]
threads = 1
[updater]
interval_seconds = 1.0
min_pending = 8
users_per_tick = 4
[inference]
default_deadline_seconds = 0
"""
LABELS = {"arm", "code", "event", "kind", "le", "outcome", "part", "partition", "phase", "reason", "state", "status",
          "task", "topic", "worker"}  # fmt: skip
MOST_CHILDREN = 50


@pytest.fixture(scope="session")
def prometheus_binary() -> str:
    """Debian's Prometheus; skips, saying why, where it cannot be had."""
    found = shutil.which("prometheus")
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "-q", "update"], ["apt-get", "-q", "install", "-y", "prometheus"]):
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=240, env=environment)
            except (subprocess.SubprocessError, OSError) as error:
                pytest.skip(f"Prometheus could not be installed: {error}")
        found = shutil.which("prometheus")
    if found is None:
        pytest.skip("no prometheus on this machine, and not root to install Debian's")
    return found


class Prometheus:
    """A running server's HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **parameters: str) -> Any:
        """Return the ``data`` of an answer; an expression that does not evaluate raises."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.loads(response.read())["data"]

    def series(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result


@contextmanager
def prometheus(binary: str, folder: Path, urls: Mapping[str, str]) -> Iterator[Prometheus]:
    """Run Prometheus on the deployment's configuration, with these workers in place of its targets."""
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus/rules.yml")]
    targets = [static for job in config["scrape_configs"] for static in job["static_configs"]]
    assert {static["labels"]["stage"] for static in targets} == set(urls)
    for static in targets:
        static["targets"] = [urls[static["labels"]["stage"]].removeprefix("http://")]
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [binary, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
               f"--web.listen-address={address}"]  # fmt: skip
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL),  # dies with us
        )
    try:
        server = Prometheus(f"http://{address}")
        wait_until(lambda: process.poll() is not None or _up(server), "Prometheus answers", 60)
        assert process.poll() is None, log.read_text()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until(done: Callable[[], Any], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.2)


def _up(server: Prometheus) -> bool:
    try:
        return len(server.series("up == 1")) == len(ADDRESS_FILES)
    except OSError:
        return False


@pytest.fixture
def running(tmp_path: Path, kafka_classpath: list[Path]) -> Iterator[Stack]:
    with stack(Session(None), tmp_path / "stack", overrides=OVERRIDES) as opened:
        yield opened


def addresses(running: Stack) -> dict[str, str]:
    """Where each worker's metrics are, once all have said so."""
    files = {stage: running.settings.service.state_dir / name for stage, name in ADDRESS_FILES.items()}
    wait_until(lambda: all(f.exists() and f.read_text().endswith("\n") for f in files.values()), "addresses", 60)
    return {stage: file.read_text(encoding="utf-8").strip() for stage, file in files.items()}


def panels() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana/dashboards/overview.json").read_text(encoding="utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def rules() -> list[dict[str, str]]:
    groups = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def without_filter(expression: str) -> str:
    """Let every comparison outside of label matchers keep its series, with 0 or 1 for a value."""
    parts = re.split(r"(\{[^}]*\})", expression)
    return "".join(
        part if part.startswith("{") else re.sub(r"(==|!=|<=|>=|<|>)(?!\s*bool\b)", r"\1 bool", part) for part in parts
    )


def test_comparisons_keep_their_series() -> None:
    assert without_filter('up{job!="a"} == 0') == 'up{job!="a"} == bool 0'
    assert without_filter("a < 0 and max(b) >= 5") == "a < bool 0 and max(b) >= bool 5"


def test_every_panel_and_rule_shows_something(running: Stack, prometheus_binary: str, tmp_path: Path) -> None:
    urls = addresses(running)
    with prometheus(prometheus_binary, tmp_path / "prometheus", urls) as server:
        events = traffic(running)
        recorded = [rule["record"] for rule in rules() if "record" in rule]
        alerts = [without_filter(rule["expr"]) for rule in rules() if "alert" in rule]
        assert panels() and recorded and alerts
        wanted = panels() + recorded + [rule["expr"] for rule in rules() if "record" in rule] + alerts
        empty: list[str] = wanted

        def all_shown() -> bool:
            nonlocal empty
            empty = [expression for expression in wanted if not server.series(expression)]
            return not empty

        deadline = time.monotonic() + 30
        while not all_shown() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not empty, "no series: " + "\n".join(empty)
        _check_state(server)
    for url in urls.values():
        check_labels(url, running, events)


def _check_state(server: Prometheus) -> None:
    found = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in found} == {rule.get("record") or rule["alert"] for rule in rules()}
    assert {rule["health"] for rule in found} == {"ok"}, [rule.get("lastError") for rule in found]
    assert not [rule["name"] for rule in found if rule.get("state") == "firing"]
    # a label of ours that a target has too would be renamed, and every "by" on it would mean the target's
    assert not [label for label in server.get("labels") if label.startswith("exported_")]
    ready = {series["metric"]["worker"] for series in server.series("oppu_worker_ready == 1")}
    assert ready == {"ingest", "updater", "inference"}
    # what is of the store or of one stage is shown by that stage alone
    assert [s["metric"]["stage"] for s in server.series("oppu_ingest_events")] == ["ingest"]
    assert [s["metric"]["stage"] for s in server.series("oppu_updater_due_users")] == ["updater"]


def traffic(running: Stack) -> list[BehaviorEvent]:
    """Events, requests in every arm, an error, a dead letter, updates, replies and paired lift."""
    broker, topics = compose.broker(running.settings), compose.topics(running.settings)
    store = compose.store(running.settings)
    client = Client(broker, topics)
    raw = broker.producer(client_id="rubbish")
    first, second = chosen_events()
    client.send_events(first)
    raw.send([OutRecord(topics.events, b"nobody", b"\xff rubbish")])
    wait_until(lambda: store.counts()["events"] >= len(first), "first events stored", 90)
    wait_until(lambda: store.counts()["adapters"] >= 1, "an adapter was published", 180)
    replies = ask(client, second)
    client.send_events(replies)
    wait_until(lambda: store.counts()["events"] >= len(first) + len(replies), "second events stored", 60)
    wait_until(lambda: any(row.matched for row in store.quality()), "answers matched", 60)
    wait_until(lambda: lift_events(store) > 0, "paired lift", 120)
    raw.close()
    client.close()
    store.close()
    return first + replies


def lift_events(store: HistoryStore) -> int:
    return sum(store.lift(base).events for base in store.bases())


def chosen_events() -> tuple[list[BehaviorEvent], list[BehaviorEvent]]:
    """Return the first and the later events of a few users, each in time order."""
    by_user: dict[str, list[BehaviorEvent]] = defaultdict(list)
    for event in read_sample().history:
        by_user[event.user_id].append(event)
    users = [events for events in by_user.values() if len(events) >= FIRST + SECOND][:USERS]
    assert len(users) == USERS
    return [e for own in users for e in own[:FIRST]], [e for own in users for e in own[FIRST : FIRST + SECOND]]


def ask(client: Client, events: list[BehaviorEvent]) -> list[BehaviorEvent]:
    """Ask about some events in every arm and about an unknown task; return the events as replies to arm ``all``."""
    count: Counter[str] = Counter()
    requests, replies = [], []
    for event in events:
        count[event.user_id] += 1
        if count[event.user_id] > ASKED:
            replies.append(event)
            continue
        requests += [
            PredictionRequest(
                request_id=f"{arm}-{event.event_id}",
                user_id=event.user_id,
                task=event.task,
                input=event.input,
                options=options,
            )
            for arm, options in ARMS.items()
        ]
        arm = list(ARMS)[len(requests) // len(ARMS) % len(ARMS)]  # each arm gets some replies
        replies.append(event.model_copy(update={"in_reply_to": f"{arm}-{event.event_id}"}))
    odd = PredictionRequest(request_id="odd", user_id=events[0].user_id, task="no-such-task", input="?")
    answers = client.ask([*requests, odd], timeout_seconds=90)
    assert len(answers) == len(requests) + 1
    assert [name for name, answer in answers.items() if answer.status == "error"] == ["odd"]
    return replies


def check_labels(url: str, running: Stack, events: list[BehaviorEvent]) -> None:
    """Label combinations are few, and no label tells of a user, an event or a version."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    hashed = compose.user_hash(running.settings)
    users = {event.user_id for event in events}
    personal = users | {hashed(UserId(u)) for u in users} | {e.event_id for e in events}
    personal |= {str(event.in_reply_to) for event in events}
    ours = [family for family in families if family.name.startswith("oppu_")]
    assert ours
    for family in ours:
        children = {tuple(sorted((k, v) for k, v in s.labels.items() if k != "le")) for s in family.samples}
        assert len(children) <= MOST_CHILDREN, f"{family.name} has {len(children)}"
        for name, value in {pair for child in children for pair in child}:
            assert name in LABELS, f"{family.name}: {name}"
            assert value not in personal, f"{family.name}: {name}"
            assert name == "partition" or not re.search(r"\d{2}|[0-9a-f]{16}", value), f"{family.name}: {name}={value}"
