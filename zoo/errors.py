"""The one exception that the zoo raises for a user's mistake."""

import difflib
from collections.abc import Iterable


class ZooError(ValueError):
    """Wrong input, told in one line: what was wrong, where, and what is allowed."""


def near_matches(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean a, b?)"`` for the known words that resemble `word`, or an empty string."""
    close = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.6)
    return f" (did you mean {', '.join(close)}?)" if close else ""
