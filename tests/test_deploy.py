"""The deployment files: they parse, start what exists, and ask only for metrics that are declared."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from oppu.cli import _COMMANDS
from oppu.metrics import fresh
from oppu.settings import ServiceSettings, Settings

DEPLOY = Path(__file__).parents[1] / "deploy"
PACKAGES = ("oppu", "ingest", "retriever", "updater", "inference", "evaluation", "benchmarks")
"""All that a command of the image may import."""


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return content


def expressions() -> list[str]:
    """Every expression of the dashboard and the rules."""
    dashboard = json.loads((DEPLOY / "grafana/dashboards/overview.json").read_text(encoding="utf-8"))
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text(encoding="utf-8"))
    panels = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    return panels + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def declared_names() -> set[str]:
    """Every series name that our metrics can produce."""
    names = set()
    for metric in fresh().registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(metric.type, ("",))
        names |= {metric.name + suffix for suffix in suffixes}
    return names


def test_every_expression_asks_for_declared_metrics() -> None:
    recorded = {"oppu:accuracy:ratio", "oppu:lift:nats_per_event"}
    for expression in expressions():
        for name in re.findall(r"\boppu[_:][a-z_:]+", expression):
            assert name in declared_names() | recorded, f"{name} in {expression}"


def test_keys_that_anybody_can_read_are_known_as_such() -> None:
    written = compose()["services"]["ingest"]["environment"]["OPPU_SERVICE__DEPLOYMENT_KEY"]
    key = re.fullmatch(r"\$\{OPPU_SERVICE__DEPLOYMENT_KEY:-(.+)\}", written)
    assert key is not None
    assert ServiceSettings(deployment_key=SecretStr(key[1])).key_is_public and ServiceSettings().key_is_public
    assert not ServiceSettings(deployment_key=SecretStr("ours")).key_is_public


def test_workers_of_the_compose_file_are_commands() -> None:
    services = compose()["services"]
    commands = [
        service["command"][0]
        for service in services.values()
        if service.get("image") == "oppu" and "command" in service
    ]
    assert sorted(commands) == ["infer", "ingest", "update"]
    assert set(commands) <= set(_COMMANDS)


def test_environment_of_the_compose_file_is_accepted_by_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in compose()["services"]["ingest"]["environment"].items():
        monkeypatch.setenv(name, re.sub(r"\$\{[^:}]+:-([^}]*)\}", r"\1", value))
    settings = Settings.load()
    assert settings.store.url == "postgresql+psycopg://oppu@postgres:5432/oppu"
    assert settings.service.metrics_port == 9464


def test_any_password_of_postgres_reaches_the_workers_as_it_is() -> None:
    services = compose()["services"]
    password = services["postgres"]["environment"]["POSTGRES_PASSWORD"]
    workers = [service["environment"] for service in services.values() if service.get("image") == "oppu"]
    assert [worker["PGPASSWORD"] for worker in workers] == [password] * 4  # libpq reads it; a URL would need it escaped
    assert not [worker for worker in workers if "$" in worker["OPPU_STORE__URL"]]


def test_scrape_targets_are_services_of_the_compose_file() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    services, port = compose()["services"], compose()["services"]["ingest"]["environment"]["OPPU_SERVICE__METRICS_PORT"]
    for job in config["scrape_configs"]:
        for target in (t for static in job["static_configs"] for t in static["targets"]):
            name, _, target_port = target.partition(":")
            assert name in services
            assert target_port == port


def test_dockerfile_copies_every_package_and_installs_an_extra_that_exists() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    for package in PACKAGES:
        assert f"COPY {package} {package}" in text
        assert (DEPLOY.parent / package / "__init__.py").exists()
    project = (DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"'\.\[([a-z-]+)\]'", text):
        assert f"\n{extra} = [" in project


def test_settings_that_alerts_and_the_compose_file_name_exist() -> None:
    texts = [(DEPLOY / name).read_text(encoding="utf-8") for name in ("prometheus/rules.yml", "compose.yaml")]
    for section, setting in re.findall(r"OPPU_([A-Z]+)__([A-Z_]+)", "\n".join(texts)):
        fields = type(getattr(Settings(), section.lower())).model_fields
        assert setting.lower() in fields, f"OPPU_{section}__{setting}"


@pytest.mark.prometheus
def test_promtool_accepts_rules_and_configuration() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (Debian's prometheus) is not installed")
    for command in (["check", "rules", "rules.yml"], ["check", "config", "prometheus.yml"]):
        done = subprocess.run(
            [promtool, *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
