"""What an operator does by command to one user's adapter: roll back, release, check before serving.

Each is one transaction of the store; the feed's record goes through its outbox. Nothing here loads a model.
"""

from datetime import datetime

from oppu.errors import AdapterUnreadable, ConfigError
from oppu.lm.port import AdapterRef, AdapterSource
from oppu.store.port import HistoryStore
from oppu.values import BaseId, Head, UserId
from oppu.wire import AdapterUpdate, Topics, record_for


def roll_back(
    store: HistoryStore,
    base: BaseId,
    user_id: UserId,
    *,
    to: int | None,
    reason: str,
    now: datetime,
    topics: Topics,
) -> Head | None:
    """Serve an earlier version, and hold training until new evidence or a release.

    Args:
        store: The history store.
        base: Which base's adapter.
        user_id: Whose.
        to: The version; ``None`` for no adapter.
        reason: For the audit trail.
        now: Current time.
        topics: Where the change is announced.

    Returns:
        The new head.

    Raises:
        ConfigError: The user has no such version.
    """
    parent = None
    if to is not None:
        known = {version.version: version for version in store.versions(base, user_id)}
        if to not in known:
            listed = ", ".join(map(str, known)) or "none"
            raise ConfigError(f"--to: expected a version of this user ({listed}), got {to}")
        parent = known[to].parent
    update = AdapterUpdate(user_id=user_id, base=base, version=to, parent=parent, cause="rolled_back")
    announce = record_for(topics.updates, user_id, update)
    return store.roll_back(base, user_id, to=to, reason=reason, now=now, announce=announce)


def release(store: HistoryStore, base: BaseId, user_id: UserId, *, now: datetime) -> None:
    """Lift hold, quarantine and back-off of a user.

    Args:
        store: The history store.
        base: Which base's adapter.
        user_id: Whose.
        now: Current time.

    Raises:
        ConfigError: The store does not know the user on this base.
    """
    if not store.release(base, user_id, now=now):
        raise ConfigError(f"user: not known on base {base}")


def check_readable(registry: AdapterSource, ref: AdapterRef) -> None:
    """Check that a version's files are there and sound, before it is made the head.

    Args:
        registry: Where versions lie.
        ref: The version.

    Raises:
        ConfigError: They are not; says why. Old versions are collected in time.
    """
    try:
        registry.load(ref)
    except AdapterUnreadable as error:
        raise ConfigError(f"--to: cannot be served: {error}") from error
