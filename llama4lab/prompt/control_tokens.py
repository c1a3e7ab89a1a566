"""Control tokens in text: where they are, and how to keep those that somebody typed from acting as such."""

import re
from typing import Any

from transformers import PreTrainedTokenizerFast

from llama4lab.prompt.tokenizer import text_ids

# Characters without a meaning of their own (Unicode's private use area); one that the text does not use is taken.
PRIVATE_USE = range(0xE000, 0xF900)


class ControlTokens:
    """The control tokens of one tokenizer: `<|eot|>`, `<|image|>` and so on."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.ids = {token.content: number for number, token in added.items() if token.special}
        # The longest name first: where two match, the tokenizers library takes the longer one.
        names = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._first_characters = sorted({name[0] for name in names})

    def split(self, text: str) -> list[str | int]:
        """Cuts text at its control tokens: stretches of text as `str`, control tokens as their ids."""
        pieces: list[str | int] = []
        end = 0
        for match in self._pattern.finditer(text):
            pieces += [text[end : match.start()], self.ids[match.group()]]
            end = match.end()
        return [piece for piece in [*pieces, text[end:]] if piece != ""]

    def encode(self, piece: str | int) -> list[int]:
        """Gives the token ids of a piece of `split`; joined, they are what the tokenizer gives for the whole text."""
        return [piece] if isinstance(piece, int) else text_ids(self.tokenizer, piece)

    def added_around(self) -> tuple[list[int], list[int]]:
        """Gives the ids that the tokenizer puts before and after a plain text, `<|begin_of_text|>` as a rule."""
        bare = self.tokenizer.encode("a", add_special_tokens=False)
        full = self.tokenizer.encode("a")
        start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return full[:start], full[start + len(bare) :]

    def disguise(self, content: Any) -> "tuple[Any, Disguise]":
        """Gives a copy of `content` in which no control token can be recognised, not even across two strings.

        Args:
            content: strings, or lists and dicts of strings (the messages of a chat).
        """
        used = "\n".join(_strings(content))
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in used and _escape(chr(code)) not in used)
        disguise = Disguise({character: next(free) for character in self._first_characters})
        return disguise.put_on(content), disguise


class Disguise:
    """Writes the first character of every control token as a character that means nothing.

    A chat template then writes its own control tokens around strings that have none; `take_off` gives the strings back.
    Only the first character is replaced, so that a template which trims or quotes a string does the same as before.
    """

    def __init__(self, mask_of: dict[str, str]) -> None:
        self._on = str.maketrans(mask_of)
        # A template may also have written the mask as a JSON escape.
        self._off = {mask: character for character, mask in mask_of.items()}
        self._off |= {_escape(mask): character for mask, character in self._off.items()}

    def put_on(self, content: Any) -> Any:
        """Gives a copy of strings, lists and dicts with every string disguised."""
        if isinstance(content, str):
            return content.translate(self._on)
        if isinstance(content, dict):
            return {self.put_on(key): self.put_on(value) for key, value in content.items()}
        if isinstance(content, (list, tuple)):
            return [self.put_on(entry) for entry in content]
        return content

    def take_off(self, text: str) -> str:
        """Gives the text as it was typed."""
        for mask, character in self._off.items():
            text = text.replace(mask, character)
        return text


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}"


def _strings(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    if isinstance(content, dict):
        return [text for entry in content.items() for part in entry for text in _strings(part)]
    if isinstance(content, (list, tuple)):
        return [text for entry in content for text in _strings(entry)]
    return []
