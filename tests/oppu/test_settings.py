"""What the settings refuse before anything is connected: variables that set nothing, addresses, files, numbers."""

import os
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, SecretStr, ValidationError

from oppu.errors import ConfigError
from oppu.settings import KafkaSettings, Settings

SASL: dict[str, object] = {
    "sasl_mechanism": "SCRAM-SHA-512",
    "sasl_username": "me",
    "sasl_password": SecretStr("hush"),
}


@pytest.fixture(autouse=True)
def _no_variables_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("OPPU_")]:
        monkeypatch.delenv(name)


def problems() -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    return caught.value.problems


# --- variables
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("OPPU_SERVICE_DEPLOYMENT_KEY", "OPPU_SERVICE__DEPLOYMENT_KEY"),
        ("OPPU_STOR__URL", "OPPU_STORE__URL"),
        ("oppu_stor__url", "OPPU_STORE__URL"),
        ("OPPU_BOOTSTRAP_SERVERS", "OPPU_KAFKA__BOOTSTRAP_SERVERS"),
        ("OPPU_KAFKA__PARTITION", "OPPU_KAFKA__PARTITIONS"),
        ("OPPU_KAFKA__PARTITIONS__X", "OPPU_KAFKA__PARTITIONS"),
        ("OPPU_CONFG", "OPPU_CONFIG"),
        ("oppu_config", "OPPU_CONFIG"),  # the command line reads it in capitals only
    ],
)
def test_a_variable_that_sets_nothing_is_refused_with_what_was_meant(
    monkeypatch: pytest.MonkeyPatch, written: str, meant: str
) -> None:
    monkeypatch.setenv(written, "hunter2")
    said = problems()
    assert f"{written}: no such setting; did you mean {meant}?" in said
    assert sum(written.upper() in problem.upper() for problem in said) == 1, "one fault, one line"
    assert "hunter2" not in "".join(said)


@pytest.mark.parametrize(
    "name",
    [
        "OPPU_SERVICE_HOST",
        "OPPU_PORT",
        "OPPU_SERVICE_PORT_METRICS",
        "OPPU_INGEST_PORT_9464_TCP_ADDR",
        "OPPU_INGEST_SERVICE_PORT",
    ],
)
def test_what_kubernetes_tells_of_our_services_is_passed_over(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "10.0.0.1")
    assert problems()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.2")
    assert Settings.load().service == Settings().service
    monkeypatch.setenv("OPPU_SERVICE_DEPLOYMENT_KEY", "secret")
    assert len(problems()) == 1


def test_a_variable_like_no_setting_is_told_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPPU_PORT_80_TCP", "tcp://10.0.0.1:80")
    [said] = problems()
    assert said.startswith("OPPU_PORT_80_TCP: no such setting; expected OPPU_SECTION__NAME")


@pytest.mark.parametrize("source", ["value", "section"])
def test_they_are_listed_with_all_other_faults(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setenv("OPPU_STOR__URL", "x")
    monkeypatch.setenv("OPPU_REGISTRI__URL", "x")
    monkeypatch.setenv(*(("OPPU_KAFKA__PARTITIONS", "0") if source == "value" else ("OPPU_KAFKA", "{")))
    registry, store, kafka = problems()
    assert (registry[:18], store[:14]) == ("OPPU_REGISTRI__URL", "OPPU_STOR__URL")
    assert kafka.startswith("kafka.partitions" if source == "value" else "environment: expected JSON")


def test_every_setting_may_be_set_in_any_case_and_a_section_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPPU_KAFKA__PARTITIONS", "oppu_kafka__replication"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("OPPU_STORE", '{"url": "sqlite:///elsewhere.db"}')
    settings = Settings.load()
    assert (settings.kafka.partitions, settings.store.url) == (3, "sqlite:///elsewhere.db")


@pytest.mark.parametrize(
    "name",
    ["OPPU_CONFIG", "OPPU_PARENT", "OPPU_KILL_EVENTS", "OPPU_KILL_SEED", "OPPU_SIM_SEED", "_OPPU_COMPLETE", "OPPUX"],
)
def test_what_others_read_is_left_to_them(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    Settings.load()


# --- numbers
def sections_with_numbers() -> list[tuple[type[BaseModel], str]]:
    kinds = [type(field.default) for field in Settings.model_fields.values()]
    return [
        (kind, name)
        for kind in kinds
        for name, field in kind.model_fields.items()
        if float in (field.annotation, *get_args(field.annotation))
    ]


@pytest.mark.parametrize(("kind", "name"), sections_with_numbers(), ids=str)
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_are_finite(kind: type[BaseModel], name: str, value: str) -> None:
    with pytest.raises(ValidationError, match="finite"):
        kind.model_validate({name: value})


# --- Kafka
@pytest.mark.parametrize(
    "servers", ["127.0.0.1:9092", "a:1, b-2.example.org:65535", "[::1]:9092", "[fe80::1%eth0]:9092,kafka_1:9", "a:1, "]
)
def test_addresses(servers: str) -> None:
    assert KafkaSettings(bootstrap_servers=servers).bootstrap_servers == servers.replace(" ", "").rstrip(",")


@pytest.mark.parametrize(
    ("servers", "wrong"),
    [
        ("kafka", "'kafka'"),
        ("kafka:", "'kafka:'"),
        (":9092", "':9092'"),
        ("kafka:port", "'kafka:port'"),
        ("kafka:0", "'kafka:0'"),
        ("kafka:65536", "'kafka:65536'"),
        ("kafka:٩", "'kafka:٩'"),
        ("a:1;b:2", "'a:1;b:2'"),
        ("a:1 b:2", "'a:1 b:2'"),
        ("a:1,,b:2", "''"),
        ("", "''"),
        ("::1:9092", "'::1:9092'"),
        ("[::1]", "'[::1]'"),
        ("SSL://kafka:9092", "'SSL://kafka:9092'"),
        ("a:1, b, c:x", "'b', 'c:x'"),
    ],
)
def test_what_is_no_address_is_refused(servers: str, wrong: str) -> None:
    with pytest.raises(ValidationError) as caught:
        KafkaSettings(bootstrap_servers=servers)
    [fault] = caught.value.errors()
    assert fault["loc"] == ("bootstrap_servers",)
    assert fault["msg"].endswith(f"expected host:port, separated by commas, got {wrong}")


@pytest.mark.parametrize("name", ["ssl_cafile", "ssl_certfile", "ssl_keyfile"])
def test_files_of_ssl_are_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "there.pem").touch()
    assert getattr(KafkaSettings.model_validate({name: tmp_path / "there.pem"}), name) == tmp_path / "there.pem"
    for path in (tmp_path / "gone.pem", tmp_path):
        with pytest.raises(ValidationError, match=f"{name}\n.*not point to a file"):
            KafkaSettings.model_validate({name: path})


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL"])
@pytest.mark.parametrize("name", sorted(SASL))
def test_credentials_that_would_not_be_used_are_refused(protocol: str, name: str) -> None:
    with pytest.raises(ValidationError, match=rf"{name}.* need security_protocol SASL_.*got {protocol}"):
        KafkaSettings.model_validate({"security_protocol": protocol, name: SASL[name]})


@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL"])
def test_sasl_needs_all_of_its_settings(protocol: str) -> None:
    assert KafkaSettings.model_validate({"security_protocol": protocol, **SASL}).sasl_username == "me"
    for left_out in SASL:
        some = {name: value for name, value in SASL.items() if name != left_out}
        with pytest.raises(ValidationError, match=f"needs .*{left_out}"):
            KafkaSettings.model_validate({"security_protocol": protocol, **some})
