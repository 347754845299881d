"""Texts to terms, for BM25 and profiles: lower-cased words of two letters or more, without English stop words.

Pure. The key by which two inputs count as the same text lives here too.
"""

import re

_WORD = re.compile(r"\w\w+")
STOP_WORDS = frozenset(
    "a an and are as at be been but by can do for from had has have he her his how if in into is it its just me my"
    " no not of on or our she so such than that the their them then there these they this to up was we were what"
    " when which who will with you your".split()
)
"""English function words: they carry no evidence, and in a small corpus their idf does not say so."""


def terms(text: str) -> list[str]:
    """Return a text's terms in order, repeats included."""
    return [word for word in _WORD.findall(text.casefold()) if word not in STOP_WORDS]


def text_key(text: str) -> str:
    """Return what near-equal texts share: letter case and white space do not count."""
    return " ".join(text.casefold().split())
