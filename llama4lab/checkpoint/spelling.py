"""Near misses: what a wrong name was probably meant to be."""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST_LIST = 20_000


def near_misses(name: str, names: Iterable[str], *, most: int = 3) -> str:
    """Gives the names that look like this one, comma-separated, or an empty string when none does."""
    candidates = list(names)
    if len(candidates) > LONGEST_LIST:
        # Comparing is quadratic; an unfused checkpoint of 128 experts has tens of thousands of names.
        candidates = [candidate for candidate in candidates if candidate[-12:] == name[-12:]][:LONGEST_LIST]
    return ", ".join(get_close_matches(name, candidates, n=most, cutoff=0.7))


def listed(names: Iterable[str], *, most: int = 3) -> str:
    """Gives the first names, comma-separated, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
