"""A prompt as HTML: tokens as small boxes coloured by kind, runs of image tokens folded, images as thumbnails.

No scripts and no requests; every token is escaped, since a prompt may hold anything.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from itertools import groupby

from PIL import Image

STYLES = {
    "pad": "color:#999;opacity:.45",
    "text": "background:#8883",
    "special": "background:#56b4e955;font-style:italic",
    "image": "background:#e69f0055",
}
TOKEN_STYLE = "padding:0 1px;margin:1px;border-radius:3px;white-space:pre-wrap;display:inline-block"
FOLD_FROM = 4
MOST_TOKENS = 2000
THUMBNAIL = 96
VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def row_html(tokens: Sequence[str], modality: Sequence[str]) -> str:
    """Gives one row of a prompt as HTML; padding and image tokens that repeat are written once with their number."""
    parts = []
    for (token, kind), run in groupby(list(zip(tokens, modality, strict=True))[:MOST_TOKENS]):
        count = len(list(run))
        if kind in ("pad", "image") and count >= FOLD_FROM:
            parts.append(_token_html(f"{token or 'pad'} × {count}", kind))
        else:
            parts += [_token_html(token or "pad", kind)] * count
    if len(tokens) > MOST_TOKENS:
        parts.append(f"<i>… {len(tokens) - MOST_TOKENS} more tokens</i>")
    return f'<div style="font-family:monospace;line-height:1.7">{"".join(parts)}</div>'


def image_html(image: Image.Image | None, caption: str) -> str:
    """Gives a thumbnail with a line below it; only the line where the image was not kept."""
    picture = ""
    if image is not None:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<img alt="" src="data:image/png;base64,{data}">'
    style = "display:inline-block;margin:0 8px 4px 0"
    return f'<div style="{style}">{picture}<div style="font-size:smaller">{escape(caption)}</div></div>'


def _token_html(token: str, kind: str) -> str:
    shown = "".join(VISIBLE.get(character, character) for character in token)
    return f'<span style="{TOKEN_STYLE};{STYLES[kind]}">{escape(shown)}</span>'
