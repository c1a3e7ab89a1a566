"""The messages of a row, found by their header tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

HEADER_START, HEADER_END = "<|header_start|>", "<|header_end|>"


@dataclass(frozen=True)
class Span:
    """A stretch of a row: one message of a chat, or the whole of a text.

    Attributes:
        role: "system", "user", "assistant", ...; "text" for a text and "ids" for token ids.
        start: position of the first token, the header of a message included.
        stop: position after the last token, `<|eot|>` included.
        content_start: position of the first token after the header.
    """

    role: str
    start: int
    stop: int
    content_start: int

    def shifted(self, by: int) -> "Span":
        """Gives the same span `by` positions later."""
        return replace(self, start=self.start + by, stop=self.stop + by, content_start=self.content_start + by)


def row_spans(tokens: Sequence[str], modality: Sequence[str], otherwise: str) -> list[Span]:
    """Gives a span for every message of a row, or one span for the whole row if it has no message headers.

    Args:
        tokens: the text of every token, "" for padding.
        modality: the kind of every token.
        otherwise: the role of the one span of a row without headers.
    """
    first = next((position for position, kind in enumerate(modality) if kind != "pad"), len(tokens))
    # A header token that a user typed is no special token and starts nothing.
    starts = [p for p, token in enumerate(tokens) if token == HEADER_START and modality[p] == "special"]
    if not starts:
        return [Span(otherwise, first, len(tokens), first)]
    return [_message(tokens, start, stop) for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True)]


def _message(tokens: Sequence[str], start: int, stop: int) -> Span:
    end = next((position for position in range(start, stop) if tokens[position] == HEADER_END), start)
    content, gap = end + 1, ""
    # The header ends with two line ends, which may be one token or two.
    while content < stop and (gap + tokens[content]) in ("\n", "\n\n"):
        gap += tokens[content]
        content += 1
    return Span("".join(tokens[start + 1 : end]).strip(), start, stop, content)
