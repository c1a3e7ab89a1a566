"""What a model still finds in its context, by distance, by place in the chunk, and without single layers' far sight."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import pandas as pd

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.attention.editing import edited
from llama4lab.run.attention.needles import Make, Needle, chunk_of, found, made, owners

NONE = "none"


def needle(
    model: HookedPreTrainedModel,
    *,
    distances: int | Sequence[int],
    borders: Sequence[int | None] = (-1, 0, 1),
    ablate: Sequence[int | Sequence[int]] | None = None,
    make: Make | None = None,
    n: int = 32,
) -> pd.DataFrame:
    """Asks for one fact among others, so many tokens after it was stated, and counts the right answers.

    The same texts are asked at every border and under every ablation; to put the needle at a border, the text begins at
    a later position than 0. Recall within a chunk can use all layers, beyond it only those that see everything.

    The needle is the last token of its fact, so a border up to three tokens before it cuts "Mary has the key" in two. A
    model that cannot join the pieces may still guess, by leaving out the things whose owners it knows. Then an ablation
    can even help, because it hides wrong things. `guessed` tells: it is the accuracy on the same texts where the fact
    is about somebody else. Only what is above it was recalled.

    Args:
        model: The model.
        distances: From the needle to the last token of the question, which is the one that answers, in tokens.
        borders: Where the needle stands in its chunk: 0 is the first token of a chunk, 1 the next one, -1 the last of
            the chunk before; None lets the text begin at position 0 instead.
        ablate: Layers that see no earlier chunk, in the sense of `bar="earlier"`, one after the other; several at once
            as a tuple. By default each of the layers that do see earlier chunks, and all of these at once.
        make: A function of the distance that gives a prompt (as `model.prompt` takes it) and its answer, text or token
            id, whose first token counts; and, if you like, a control: a prompt of the same length that does not tell
            the answer. By default "Mary has the key." among other owners, drawn with seed 0; see `owners`.
        n: How many texts for each distance.

    Columns:
        distance: tokens from the needle to the last token.
        border: where the needle stands; missing for texts that begin at position 0.
        crossed: borders between the needle and the last token; missing for such texts.
        ablated: "none", or the layers that saw no earlier chunk, for example "3, 7".
        accuracy: share of texts whose answer is the most probable next token.
        log_prob: log probability of the answer, the mean over the texts.
        guessed: the accuracy on the controls; missing if `make` gives none.
        n: number of texts.

    Raises:
        ValueError: if there is nothing to ask, a border in a model without chunks, a layer that never sees an earlier
            chunk, or a text that does not fit its distance.
        IndexError: if there is no such layer.
    """
    distances = [distances] if isinstance(distances, int) else list(distances)
    if n < 1 or not distances or not borders:
        raise ValueError(f"{n} texts at {len(distances)} distances and {len(borders)} borders leave nothing to ask.")
    size = chunk_of(model, borders)
    groups = _groups(model, ablate, chunked=size is not None)
    make = owners(model) if make is None else make
    lines = []
    for distance in distances:
        needles = made(model, make, distance, n)
        for group in groups:
            with ExitStack() as stack:
                if group:
                    stack.enter_context(edited(model, layers=group, bar="earlier"))
                for border in borders:
                    correct, log_prob = found(model, needles, border)
                    guessed = _guessed(model, needles, border)
                    crossed = pd.NA if border is None or size is None else (border % size + distance) // size
                    label = ", ".join(map(str, group)) or NONE
                    shares = correct.float().mean().item(), log_prob.mean().item(), guessed
                    lines.append((distance, border, crossed, label, *shares, n))
    columns = ["distance", "border", "crossed", "ablated", "accuracy", "log_prob", "guessed", "n"]
    return pd.DataFrame(lines, columns=columns).astype(dict.fromkeys(["border", "crossed"], "Int64"))


def _guessed(model: HookedPreTrainedModel, needles: list[Needle], border: int | None) -> float:
    """The accuracy on the controls."""
    controls = [replace(needle, ids=needle.control) for needle in needles if needle.control is not None]
    if len(controls) < len(needles):
        return float("nan")
    return found(model, controls, border)[0].float().mean().item()


def _groups(
    model: HookedPreTrainedModel, ablate: Sequence[int | Sequence[int]] | None, *, chunked: bool
) -> list[list[int]]:
    """The layers to bar at once; first none."""
    if ablate is None:
        whole = [layer for layer, size in enumerate(model.text.chunk_sizes) if size is None] if chunked else []
        return [[], *([layer] for layer in whole), *([whole] if len(whole) > 1 else [])]
    return [[], *([each] if isinstance(each, int) else sorted(each) for each in ablate)]
