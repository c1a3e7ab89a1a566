"""Tokens as text that a browser can show in one line, whatever they hold."""

MARKS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}


def visible(token: str, longest: int = 24) -> str:
    r"""Gives a token as one line: spaces and line ends as marks, what cannot be printed as its code (`\u202e`).

    It is plain text and may hold `<` and `&`: escape it where it becomes HTML.

    Args:
        token: The token's text.
        longest: The most characters; a longer token ends in an ellipsis.
    """
    shown = ""
    for character in token:
        mark = MARKS.get(character, character)
        shown += mark if mark.isprintable() else mark.encode("unicode_escape").decode()
        if len(shown) > longest:
            return shown[: longest - 1] + "…"
    return shown
