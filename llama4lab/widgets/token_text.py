"""Tokens as text that a browser can show, whatever they hold. It is plain text: escape it where it becomes HTML."""

MARKS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
BREAKS = {"\n": "↵\n", "\t": "⇥", "\r": "␍", "": "·"}


def visible(token: str, longest: int = 24) -> str:
    r"""Gives a token as one line: spaces and line ends as marks, what cannot be printed as its code (`\u202e`).

    Args:
        token: The token's text.
        longest: The most characters; a longer token ends in an ellipsis.
    """
    shown = ""
    for character in token:
        shown += _printed(MARKS.get(character, character))
        if len(shown) > longest:
            return shown[: longest - 1] + "…"
    return shown


def readable(token: str) -> str:
    r"""Gives a token as a part of a text that is read: spaces stay, a line end is marked and stays.

    What cannot be printed becomes its code, so that no token turns the text around it the other way (`\u202e`).
    """
    return "".join(BREAKS.get(character) or _printed(character) for character in token) or BREAKS[""]


def _printed(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
