"""Names, globs and lists of both -> hook points."""

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from llama4lab.model.hook_points import HookPoints

Selector = str | Iterable[str]


def selected(points: HookPoints, at: Selector) -> list[str]:
    """Gives the names that a selector means, in the order of the forward pass, each once.

    A glob is matched part by part: `*` stands for one part or a piece of it, `**` for any number of parts. So
    `layers.*.resid_post` is one hook point a layer, and `layers.3.**` all hook points of layer 3.

    Args:
        points: The hook points to choose from, `model.hook_points()`.
        at: A name, a glob, or several of them.

    Raises:
        ValueError: if a name or glob matches nothing; the message has the nearest names.
    """
    patterns = [at] if isinstance(at, str) else list(at)
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in points if _matches(name.split("."), pattern.split("."))]
        if not found:
            near = get_close_matches(pattern, points, n=4, cutoff=0.4)
            raise ValueError(
                f"{pattern!r} matches none of the {len(points)} hook points of this model.\n"
                f"Near names: {', '.join(near) or 'none'}. All of them: model.hook_points()."
            )
        chosen.update(found)
    return [name for name in points if name in chosen]


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
