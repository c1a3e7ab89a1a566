"""Rollouts: how attention carries image patches, layer upon layer, to one token of the text.

Each layer is a matrix whose rows say from where a place gets what it holds after the layer: half by the residual
stream from itself, half by attention, the mean over the heads (Abnar & Zuidema 2020, "Quantifying attention flow in
transformers"). The product over the text layers says what a token has from each image token, that over the vision tower
what an image token has from each image patch. Between them pixel shuffle puts the patches of a square into one image
token, in equal parts; adapter and projector work on each image token alone and mix nothing.

With gradients only attention that raises a metric counts, pattern times derivative where that is positive, and it is
added to what a place has already (Chefer et al. 2021, "Generic attention-model explainability").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.image_layout import ImageLayout
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.listening import listening
from llama4lab.run.metric_gradients import differentiated
from llama4lab.run.metrics import Metric


@dataclass(frozen=True, eq=False)
class Rollout:
    """From where one token has what it holds at the end of the text model. All shares together are 1.

    Attributes:
        text: the share of every token of the row; 0 for image tokens, whose shares are those of their patches.
        patches: the share of every image patch, for the tiles of the row in order.
        class_tokens: the share of the class token of each tile.
    """

    text: Float[Tensor, " seq"]
    patches: Float[Tensor, "tile patch"]
    class_tokens: Float[Tensor, " tile"]


def attention_rollout(model: HookedPreTrainedModel, prompt: Prompt, row: int, position: int) -> Rollout:
    """Rolls out attention to a token.

    Heads are averaged while the model runs, so that one matrix of each layer is kept.

    Args:
        model: The model.
        prompt: A prompt with an image in the row.
        row: The row of the token.
        position: The position of the token.

    Raises:
        ValueError: if the row has no image, or the position is padding.
        IndexError: if there is no such row or position.
    """
    row, position = checked_place(prompt, row, position)
    own, (text, vision) = prompt.row(row), _pattern_names(model)
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[Tensor], None]:
        def keep(pattern: Tensor) -> None:
            seen[name] = pattern.float().mean(dim=1).cpu()

        return keep

    with torch.no_grad(), listening(model, {name: keeper(name) for name in (*text, *vision)}):
        model(**own.to(model.device).inputs(), use_cache=False)
    valid = own.attention_mask.cpu().bool()
    layers = [half_itself(seen[name], valid) for name in text], [half_itself(seen[name]) for name in vision]
    return rolled_out(own.images, *layers, position)


def gradient_rollout(
    model: HookedPreTrainedModel,
    prompt: Prompt,
    row: int,
    position: int,
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """Rolls out the attention that raises a metric.

    The patterns of all layers and heads are in memory, and what the backward pass needs.

    Args:
        model: The model.
        prompt: A prompt with an image in the row.
        row: The row of the token.
        position: The position of the token; that from which the metric reads the logits.
        metric: The metric; by default the largest logit at the position.

    Raises:
        ValueError: if the row has no image, the position is padding, or the metric has no derivative.
        IndexError: if there is no such row or position.
    """
    row, position = checked_place(prompt, row, position)
    text, vision = _pattern_names(model)

    def largest(logits: Tensor) -> Tensor:
        return logits[:, position].max(dim=-1).values

    names = [*text, *vision]
    passed = differentiated(model, prompt, largest if metric is None else metric, names, by=names)
    tiles = [tile for layout in prompt.images if layout.row == row for tile in range(layout.tiles.stop)[layout.tiles]]

    def layers(names: list[str], kept: list[int]) -> list[Tensor]:
        return [itself_and_raising(passed.values[name][kept], passed.gradients[name][kept]) for name in names]

    return rolled_out(prompt.row(row).images, layers(text, [row]), layers(vision, tiles), position)


def half_itself(
    pattern: Float[Tensor, "batch query key"], valid: Bool[Tensor, "batch query"] | None = None
) -> Float[Tensor, "batch query key"]:
    """Half a place itself, half what its attention brings; padding, which attends to nothing, is all itself."""
    itself = torch.eye(pattern.shape[-1])
    mixed = 0.5 * pattern + 0.5 * itself
    return mixed if valid is None else torch.where(valid[:, :, None], mixed, itself)


def itself_and_raising(
    pattern: Float[Tensor, "batch head query key"], gradient: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch query key"]:
    """A place itself, and attention in so far as it raises the metric."""
    raising = (pattern.float() * gradient.float()).clamp_min(0).mean(dim=1).cpu()
    return raising + torch.eye(raising.shape[-1])


def rolled_out(
    images: Sequence[ImageLayout],
    text: Sequence[Float[Tensor, "1 query key"]],
    vision: Sequence[Float[Tensor, "tile place place"]],
    position: int,
) -> Rollout:
    """Joins the layers, from the last to the first, for one token.

    Args:
        images: The images of the row.
        text: The matrix of each text layer.
        vision: The matrix of each layer of the vision tower.
        position: The position of the token.
    """
    tokens = torch.zeros(1, text[0].shape[-1])
    tokens[0, position] = 1.0
    (tokens,) = _through(tokens[:, None], text).unbind(1)
    of_patches = [_unshuffled(layout, tokens[0, layout.positions.cpu()]) for layout in images]
    # The class token comes last; no image token is made of it.
    places = torch.nn.functional.pad(torch.cat(of_patches), (0, 1))
    (places,) = _through(places[:, None], vision).unbind(1)
    for layout in images:
        tokens[0, layout.positions.cpu()] = 0.0
    total = tokens.sum() + places.sum()
    return Rollout(tokens[0] / total, places[:, :-1] / total, places[:, -1] / total)


def checked_place(prompt: Prompt, row: int, position: int) -> tuple[int, int]:
    """Gives row and position counted from the begin.

    Raises:
        ValueError: if the row has no image, or the position is padding.
        IndexError: if there is no such row or position.
    """
    rows, length = prompt.input_ids.shape
    for name, number, count in (("Row", row, rows), ("Position", position, length)):
        if not -count <= number < count:
            raise IndexError(f"{name} {number} was asked for; the prompt has {count}, from 0 to {count - 1}.")
    row, position = row % rows, position % length
    own = [layout for layout in prompt.images if layout.row == row]
    if not own:
        raise ValueError(f"Attention onto an image was asked for, but row {row} of the prompt has no image.")
    if not prompt.attention_mask[row, position]:
        raise ValueError(f"Position {position} was asked for, but in row {row} it is padding.")
    return row, position


def _through(
    weights: Float[Tensor, "batch 1 place"], layers: Sequence[Float[Tensor, "batch place place"]]
) -> Float[Tensor, "batch 1 place"]:
    for layer in reversed(layers):
        weights = weights @ layer
    return weights


def _unshuffled(layout: ImageLayout, weights: Float[Tensor, " token"]) -> Float[Tensor, "tile patch"]:
    """The weights of image tokens on their patches: each has an equal part."""
    of_patches = weights[layout.patch_tokens] / (layout.patch_tokens == 0).sum()
    return of_patches.unflatten(0, (layout.num_tiles, -1))


def _pattern_names(model: HookedPreTrainedModel) -> tuple[list[str], list[str]]:
    """The hook points of the patterns of the text layers and of the vision tower, in order."""
    names = [name for name in model.hook_points() if name.endswith("self_attn.pattern")]
    vision = [name for name in names if name.startswith("vision_model.")]
    return [name for name in names if name not in vision], vision
