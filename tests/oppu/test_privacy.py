"""Keyed hashes: stable, keyed, and never the same as a seal."""

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oppu.errors import ConfigError
from oppu.privacy import UserHash


def test_is_the_hmac_of_the_utf8_bytes() -> None:
    expected = hmac.new(b"key", "Zoë\u0000".encode(), hashlib.sha256).hexdigest()
    assert UserHash("key")("Zoë\u0000") == UserHash(b"key")("Zoë\u0000") == expected


def test_depends_on_the_key_and_never_shows_it() -> None:
    assert UserHash("a secret")("u") != UserHash("another")("u")
    assert "a secret" not in repr(UserHash("a secret"))


@pytest.mark.parametrize("key", ["", b""])
def test_refuses_an_empty_key(key: str | bytes) -> None:
    with pytest.raises(ConfigError, match="deployment_key"):
        UserHash(key)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_hash_is_no_seal(text: str) -> None:
    by = UserHash("key")
    assert by.sealed(text.encode(), by.seal(text.encode()))
    assert not by.sealed(text.encode(), by(text))
    assert not UserHash("other").sealed(text.encode(), by.seal(text.encode()))
