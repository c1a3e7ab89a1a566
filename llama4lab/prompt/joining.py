"""Several prompts as one batch."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from llama4lab.prompt.prompt import Prompt


def joined(prompts: Sequence[Prompt]) -> Prompt:
    """Gives the rows of all prompts as one prompt, the shorter ones padded further on the left.

    Args:
        prompts: at least one, all for the same model.
    """
    if not prompts:
        raise ValueError("Prompts were to be joined to a batch, but there are none.")
    length = max(prompt.input_ids.shape[1] for prompt in prompts)
    padded = [_padded(prompt, length - prompt.input_ids.shape[1]) for prompt in prompts]
    images, first_row, first_tile = [], 0, 0
    for prompt in padded:
        for layout in prompt.images:
            images.append(layout.shifted(layout.row + first_row, first_tile))
            first_tile += layout.num_tiles
        first_row += len(prompt)
    pixels = [prompt.pixel_values for prompt in padded if prompt.pixel_values is not None]
    return Prompt(
        input_ids=torch.cat([prompt.input_ids for prompt in padded]),
        attention_mask=torch.cat([prompt.attention_mask for prompt in padded]),
        pixel_values=torch.cat(pixels) if pixels else None,
        tokens=[row for prompt in padded for row in prompt.tokens],
        modality=[row for prompt in padded for row in prompt.modality],
        images=images,
        spans=[row for prompt in padded for row in prompt.spans],
        tokenizer=padded[0].tokenizer,
    )


def _padded(prompt: Prompt, by: int) -> Prompt:
    pad = prompt.tokenizer.pad_token_id if prompt.tokenizer is not None else None
    return replace(
        prompt,
        # Padding is never attended to: without a token of its own any id will do.
        input_ids=F.pad(prompt.input_ids, (by, 0), value=pad if isinstance(pad, int) else 0),
        attention_mask=F.pad(prompt.attention_mask, (by, 0)),
        tokens=[[""] * by + row for row in prompt.tokens],
        modality=[["pad"] * by + row for row in prompt.modality],
        images=[replace(layout, positions=layout.positions + by) for layout in prompt.images],
        spans=[[span.shifted(by) for span in row] for row in prompt.spans],
    )
