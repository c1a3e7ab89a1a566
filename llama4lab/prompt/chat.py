"""Chat messages -> the text that a checkpoint's chat template makes of them, cut at its control tokens.

Messages are transformers': `{"role": "user", "content": "..."}`, where the content is a string or a list of
`{"type": "text", "text": "..."}` and `{"type": "image", "image": ...}`. An image part without an image takes the next
of those that are given apart (`images=` of a prompt).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from jinja2 import TemplateError

from llama4lab.prompt.control_tokens import ControlTokens

ROLES = ("system", "user", "assistant", "tool", "ipython")
IMAGE_KEYS = ("image", "path")


@dataclass
class RenderedChat:
    """A chat as the template writes it.

    Attributes:
        pieces: stretches of text, and control tokens as ids.
        images: the image of every image part, in order; None for a part that has none of its own.
    """

    pieces: list[str | int]
    images: list[Any]


def render(
    control: ControlTokens, chat: list[dict[str, Any]], parse_special: bool, add_generation_prompt: bool
) -> RenderedChat:
    """Writes a chat by the tokenizer's chat template.

    Args:
        control: the control tokens of the tokenizer, which holds the chat template.
        chat: the messages.
        parse_special: whether `<|eot|>` and the like inside of a message act as control tokens. transformers says yes.
            Meta's code says no, so that nobody can end a turn by typing.
        add_generation_prompt: end with the header of an answer of the assistant.

    Raises:
        ValueError: if there is no template, or a message is not one.
    """
    tokenizer = control.tokenizer
    if tokenizer.chat_template is None:
        raise ValueError(
            "A chat was given, but the tokenizer of this checkpoint has no chat template.\n"
            "Put chat_template.jinja into its folder, or give the whole prompt as text."
        )
    images: list[Any] = []
    messages = [_checked_message(message, number, images) for number, message in enumerate(chat)]
    disguised, disguise = control.disguise(messages)
    try:
        text = tokenizer.apply_chat_template(
            messages if parse_special else disguised, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ValueError(f"The chat template of this checkpoint refuses the chat.\nIt says: {error}") from error
    pieces = control.split(str(text))
    if not parse_special:
        pieces = [disguise.take_off(piece) if isinstance(piece, str) else piece for piece in pieces]
    return RenderedChat(pieces, images)


def _checked_message(message: Any, number: int, images: list[Any]) -> dict[str, Any]:
    """Gives the message as the template needs it and appends its images to `images`."""
    where = f"Message {number} of the chat"
    if not isinstance(message, dict):
        raise TypeError(f"{where} is a {type(message).__name__}, not a dict with 'role' and 'content'.")
    missing = [key for key in ("role", "content") if key not in message and not (key == "content" and _calls(message))]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}.\nIts keys are {sorted(map(str, message))}.")
    _check_role(message["role"], where)
    content = message.get("content", "")
    if isinstance(content, str) or message["role"] in ("tool", "ipython"):
        return {**message, "content": content}
    if not isinstance(content, list):
        raise TypeError(f"{where} has a content of type {type(content).__name__}; give a str or a list of parts.")
    parts = list(_checked_parts(content, where, images))
    if message["role"] == "system":
        # The published template reads the first part of a system message only.
        if any(part["type"] != "text" for part in parts):
            raise ValueError(f"{where} is a system message with an image.\nThe template takes only text there.")
        return {**message, "content": "".join(part["text"] for part in parts)}
    return {**message, "content": parts}


def _calls(message: dict[str, Any]) -> bool:
    return bool(message.get("tool_calls"))


def _check_role(role: Any, where: str) -> None:
    if role not in ROLES:
        near = get_close_matches(str(role), ROLES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Roles are {', '.join(ROLES)}."
        raise ValueError(f"{where} has the role {role!r}.\n{hint}")


def _checked_parts(content: list[Any], where: str, images: list[Any]) -> Iterator[dict[str, Any]]:
    for position, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
            yield {"type": "text", "text": part["text"]}
        elif isinstance(part, dict) and kind == "image":
            unknown = sorted(set(part) - {"type", *IMAGE_KEYS})
            if unknown:
                raise ValueError(
                    f"Part {position} of {where[0].lower()}{where[1:]} is an image with the key {unknown[0]!r}.\n"
                    "Give the image itself, or a path, under 'image'; nothing is downloaded."
                )
            images.append(next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None))
            yield {"type": "image"}
        else:
            shown = repr(part)
            raise ValueError(
                f"Part {position} of {where[0].lower()}{where[1:]} is {shown[:60]}{'...' if len(shown) > 60 else ''}.\n"
                "A part is {'type': 'text', 'text': '...'} or {'type': 'image', 'image': ...}."
            )
