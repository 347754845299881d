"""How near a written text is to the user's own, and whether it is one at all. Pure.

ROUGE-1 and ROUGE-L as F1 (C.-Y. Lin, ACL workshop "Text Summarization Branches Out", 2004), on lower-case runs of
letters and digits without stemming, as the ``rouge-score`` package does by default for English. That reads ASCII
alone; texts whose letters are mostly others are taken by runs of any letters and digits, Chinese and Japanese ones,
which put no space between words, letter by letter.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"[a-z0-9]+")
_SPACELESS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_ANY_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")
_LOOP = 3
"""So many words in a row that come twice are a loop, in texts as short as titles."""
_COPIED = 4
"""So many words in a row at least make a copy of the input."""


def words(text: str) -> list[str]:
    """Return a text's words as ROUGE compares them."""
    letters = [letter for letter in text if letter.isalpha()]
    other = sum(not letter.isascii() for letter in letters)
    return (_ANY_WORD if 2 * other > len(letters) else _WORD).findall(text.lower())


def rouge_1(written: str, true: str) -> float:
    """Return the F1 of common words, each counted as often as it occurs in both."""
    own, wanted = words(written), words(true)
    return _f1((Counter(own) & Counter(wanted)).total(), len(own), len(wanted))


def rouge_l(written: str, true: str) -> float:
    """Return the F1 of the longest common subsequence of words."""
    own, wanted = words(written), words(true)
    return _f1(_common(own, wanted), len(own), len(wanted))


def is_repeated(text: str) -> bool:
    """Say whether three words in a row come twice."""
    own = words(text)
    runs = [tuple(own[at : at + _LOOP]) for at in range(len(own) - _LOOP + 1)]
    return len(set(runs)) < len(runs)


def is_copied(text: str, source: str, earlier: Iterable[str]) -> bool:
    """Say whether a text is word by word an earlier output of the user, or a run of the input of four words or more."""
    own = words(text)
    if not own:
        return False
    run = f" {' '.join(own)} "
    return (len(own) >= _COPIED and run in f" {' '.join(words(source))} ") or any(words(e) == own for e in earlier)


def _f1(common: int, own: int, wanted: int) -> float:
    return 2 * common / (own + wanted) if common else 0.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    best = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for at, other in enumerate(b, start=1):
            above = best[at]
            best[at] = before + 1 if word == other else max(above, best[at - 1])
            before = above
    return best[-1]
