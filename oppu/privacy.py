"""User ids as they may appear outside the store: keyed hashes, in logs, paths and manifests.

HMAC-SHA-256 under the deployment key, so that nobody without the key can test whether a known user is present.
The same key seals documents (adapter manifests), under a derived key so that no hash of a user is ever a seal.
"""

import hashlib
import hmac

from oppu.errors import ConfigError

_SEAL = b"oppu seal v1"


class UserHash:
    """Maps a user id to 64 hex digits; also seals bytes under the same deployment key."""

    def __init__(self, key: str | bytes) -> None:
        """Take the deployment key.

        Args:
            key: The secret; text is taken as UTF-8.

        Raises:
            ConfigError: The key is empty.
        """
        raw = key.encode() if isinstance(key, str) else bytes(key)
        if not raw:
            raise ConfigError("service.deployment_key: expected a key that is not empty")
        self._key = raw
        self._seal_key = hmac.new(raw, _SEAL, hashlib.sha256).digest()

    def __repr__(self) -> str:
        return "UserHash(**********)"

    def __call__(self, user_id: str) -> str:
        """Return the hex HMAC-SHA-256 of the id's UTF-8 bytes."""
        return hmac.new(self._key, user_id.encode(), hashlib.sha256).hexdigest()

    def seal(self, content: bytes) -> str:
        """Return a hex code that only a holder of the deployment key can make for this content."""
        return hmac.new(self._seal_key, content, hashlib.sha256).hexdigest()

    def sealed(self, content: bytes, seal: str) -> bool:
        """Say whether ``seal`` is this content's, in constant time."""
        return hmac.compare_digest(self.seal(content).encode(), seal.encode())
