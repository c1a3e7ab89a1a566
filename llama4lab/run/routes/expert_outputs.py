"""What the routed experts of chosen tokens were given, and what they would write when fed otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama4lab.model.facts import facts
from llama4lab.model.moe import MixtureOfExperts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.listening import is_hooked
from llama4lab.run.recording import as_prompt, record
from llama4lab.run.run import Run

Places = int | Sequence[int] | None
ROUTED = "layers.{}.feed_forward."


@dataclass(frozen=True, eq=False)
class RoutedSlots:
    """Slots of tokens, each with the expert that it was sent to; padding is left out.

    Attributes:
        run: The run of the prompt, with routers and `resid_mid` of the layers.
        row: The row of each.
        layer: Its layer.
        position: Its position in the row.
        slot: Which of the token's choices it is.
        expert: The expert that ran.
        gate: The factor on its input.
        logits: The logits of the router, as it chose.
        experts: The experts in all slots of the token.
    """

    run: Run
    row: Int[np.ndarray, " place"]
    layer: Int[np.ndarray, " place"]
    position: Int[np.ndarray, " place"]
    slot: Int[np.ndarray, " place"]
    expert: Int[np.ndarray, " place"]
    gate: Float[Tensor, " place"]
    logits: Float[Tensor, "place expert"]
    experts: Int[np.ndarray, "place slot"]

    def __len__(self) -> int:
        return len(self.row)

    @property
    def tokens(self) -> list[str]:
        """The text of each token."""
        texts = self.run.prompt.tokens
        return [texts[row][position] for row, position in zip(self.row, self.position, strict=True)]

    def entries(
        self, cell: Int[np.ndarray, " line"], place: Int[np.ndarray, " line"], kept: Bool[np.ndarray, " line"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cell, row, position and slot of some lines of a table, as `Given` has them."""
        columns = (self.row[place], self.position[place], self.slot[place])
        row, position, slot = (torch.from_numpy(column[kept]) for column in columns)
        return torch.from_numpy(cell[kept]), row, position, slot


def routed_slots(
    model: HookedPreTrainedModel, prompt: Any, layer: Places = None, position: Places = None, slot: int | None = 0
) -> RoutedSlots:
    """Runs a prompt and gives what its routers chose.

    Args:
        model: The model.
        prompt: A `Prompt`, or anything that `model.prompt` takes.
        layer: A layer with a router or several; None for all.
        position: A position or several, negative ones counting from the end; None for all.
        slot: Which of the token's choices, 0 for the best; None for each.

    Raises:
        ValueError: if a layer has no router, or nothing is asked for.
        IndexError: if there is no such layer, position or slot, or padding is there in all rows.
    """
    prompt = as_prompt(model, prompt)
    layers, positions = routed_layers(model, layer), _positions(prompt, position)
    top_k = model.text.config.num_experts_per_tok
    if slot is not None and not 0 <= slot < top_k:
        raise IndexError(
            f"slot={slot} was asked for; this model sends a token to {top_k} experts: slots 0 to {top_k - 1}."
        )
    slots = range(top_k) if slot is None else [slot]
    names = [ROUTED.format(each) + f"router.{part}" for each in layers for part in ("logits", "indices", "gates")]
    run = record(model, prompt, at=[*names, *(f"layers.{each}.resid_mid" for each in layers)])
    grid = np.meshgrid(np.arange(len(prompt)), np.arange(len(layers)), positions, list(slots), indexing="ij")
    row, number, column, choice = (axis.ravel() for axis in grid)
    kept = prompt.attention_mask.cpu().numpy().astype(bool)[row, column]
    row, number, column, choice = (axis[kept] for axis in (row, number, column, choice))

    def taken(part: str) -> Tensor:
        stacked = torch.stack([run[ROUTED.format(each) + f"router.{part}"].cpu() for each in layers])
        return stacked[number, row, column]

    experts, each = taken("indices"), torch.arange(len(row))
    expert, gate = experts[each, choice].numpy(), taken("gates")[each, choice]
    own = np.array(layers)[number]
    return RoutedSlots(run, row, own, column, choice, expert, gate, taken("logits"), experts.numpy())


def routed_layers(model: HookedPreTrainedModel, layer: Places) -> list[int]:
    """Gives the layers that are meant, in order, after a check that each has a router.

    Raises:
        ValueError: if one has none, or nothing is asked for.
        IndexError: if there is no such layer.
    """
    meta = facts(model.config)
    known, count = meta["moe_layers"], meta["num_layers"]
    if not known:
        raise ValueError("This model has no router: all its layers are dense.")
    wanted = known if layer is None else np.atleast_1d(layer).tolist()
    wrong = [each for each in wanted if not 0 <= each < count]
    if wrong:
        raise IndexError(f"Layer {wrong[0]} was asked for; the model has layers 0 to {count - 1}.")
    dense = [each for each in wanted if each not in known]
    if dense or not wanted:
        found = f"layer {dense[0]}, which is dense: it has no router" if dense else "no layer"
        raise ValueError(f"Routing was asked for at {found}.\nLayers with experts: {', '.join(map(str, known))}.")
    return sorted(set(wanted))


@torch.no_grad()
def expert_outputs(
    model: HookedPreTrainedModel,
    run: Run,
    layer: int,
    gates: Float[Tensor, "batch seq slot"],
    positions: Sequence[int] | None = None,
) -> Float[Tensor, "batch position slot d_model"]:
    """Gives what the experts that ran would write with other gates. A gate scales the expert's input.

    Args:
        model: The model.
        run: A run of the whole prompt, with `router.indices` and `resid_mid` of the layer.
        layer: The layer.
        gates: The gate of each choice.
        positions: Where it is wanted; None for all positions.
    """
    block = model.text.layers[layer]
    columns = list(range(gates.shape[1])) if positions is None else list(positions)
    # Somebody who edits what experts write counts on the tokens of the whole prompt.
    asked = list(range(gates.shape[1])) if is_hooked(model) else columns
    x, indices = run[f"layers.{layer}.resid_mid"][:, asked], run[ROUTED.format(layer) + "router.indices"][:, asked]
    normed = block.post_attention_layernorm(x)
    written = cast(MixtureOfExperts, block.feed_forward).experts(
        normed, indices, gates[:, asked].to(normed.device, normed.dtype)
    )
    return written[:, [asked.index(column) for column in columns]]


class WriteSums:
    """Sums over the tokens that each expert of a layer serves.

    Attributes:
        seen: How many tokens there were in all.
        tokens: How many each expert served.
        norms: The sum of the norms of what it wrote.
        plain_norms: The sum of the norms of what it would write without a gate.
        writes: The sum of what it wrote.
    """

    def __init__(self, num_experts: int, d_model: int):
        self.seen = 0
        self.tokens = np.zeros(num_experts, dtype=np.int64)
        self.norms, self.plain_norms = np.zeros(num_experts), np.zeros(num_experts)
        self.writes = torch.zeros(num_experts, d_model, dtype=torch.float64)

    def add(
        self,
        experts: Int[Tensor, "token slot"],
        writes: Float[Tensor, "token slot d_model"],
        plain: Float[Tensor, "token slot d_model"],
    ) -> None:
        """Takes up tokens: their experts, what these wrote, and what they would write without a gate."""
        chosen, count = experts.flatten().numpy(), len(self.tokens)
        self.seen += len(experts)
        self.tokens += np.bincount(chosen, minlength=count)
        self.norms += np.bincount(chosen, writes.norm(dim=-1).flatten().numpy(), count)
        self.plain_norms += np.bincount(chosen, plain.norm(dim=-1).flatten().numpy(), count)
        self.writes.index_add_(0, experts.flatten(), writes.flatten(0, 1))

    def mean_write(self) -> Float[Tensor, "expert d_model"]:
        """The mean of what each expert wrote; 0 without a token."""
        return self.writes / torch.from_numpy(self.tokens).clamp(min=1)[:, None]


def _positions(prompt: Prompt, position: Places) -> list[int]:
    """The positions that are meant, in order."""
    length, real = prompt.input_ids.shape[1], prompt.attention_mask.cpu().bool().any(0)
    if position is None:
        return real.nonzero().flatten().tolist()
    wanted = np.atleast_1d(position).tolist()
    if not wanted:
        raise ValueError("No position was asked for. Pass one, several, or None for all.")
    for each in wanted:
        if not -length <= each < length:
            raise IndexError(f"Position {each} was asked for; the prompt has positions 0 to {length - 1}.")
        if not real[each]:
            raise IndexError(f"Position {each} was asked for, which is padding in every row.")
    return sorted({each % length for each in wanted})
