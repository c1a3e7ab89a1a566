"""Direct logit attribution: who wrote the logit of a token.

The residual stream is a sum: the embedding, what each head wrote, each expert, each MLP. With the scale of the final
norm frozen at what it was in the run, a logit is a linear function of the stream, so it is the sum of what each part
contributes (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits). That is the direct effect alone;
what a part does by way of later layers is theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.tokenizer import token_strings
from llama4lab.run.run import Run
from llama4lab.run.unembedding import CHUNK_NBYTES, Tokens, Unembedding, input_device, token_ids
from llama4lab.tables.token_index import at_tokens, tokens_of

PARTS = ("embed", "head", "bias", "expert", "shared_expert", "mlp", "rounding")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the sum of all sizes; else
HALF_TOLERANCE = 0.05
COLUMNS = ["row", "position", "token", "part", "layer", "head", "expert", "contribution", "share"]


def needs(model: HookedPreTrainedModel) -> list[str]:
    """Gives the hook points that a run must have: `lab.record(model, prompt, at=needs(model))`."""
    layers = list(model.text.layers)
    names = ["embed_merged"]
    for layer, block in enumerate(layers):
        names.append(f"layers.{layer}.self_attn.z")
        if hasattr(block.feed_forward, "router"):
            kinds = ("router.indices", "experts.out", "shared_expert.out")
            names += [f"layers.{layer}.feed_forward.{kind}" for kind in kinds]
        else:
            names.append(f"layers.{layer}.feed_forward.out")
    return [*names, f"layers.{len(layers) - 1}.resid_post"]


@torch.no_grad()
def contributions(
    model: HookedPreTrainedModel,
    run: Run,
    of: Tokens | Float[Tensor, "... d_model"],
    minus: Tokens | None = None,
    *,
    position: int | Sequence[int] | None = -1,
) -> pd.DataFrame:
    """Splits a logit, or a difference of two, into what each part of the model contributes directly.

    The contributions of a row and position sum to the logit that the run has there.

    Args:
        model: The model.
        run: A run recorded with `at=lab.tables.logit_attribution.needs(model)`.
        of: The token (text or id) whose logit is split, or one for each row of the prompt; or any direction `[d_model]`
            or `[row, d_model]` that the normed vector (hook point `final_norm`) is multiplied with.
        minus: A token whose logit is taken off, or one for each row.
        position: The position whose next token it is, -1 is the last one of the run; several; or None for all tokens.

    Columns:
        row: row of the prompt.
        position: position whose next token it is about.
        token: text of the token at that position.
        part: "embed" (of a token, or an image feature), "head", "bias" (of an attention output, if it has one),
            "expert" (routed; its slots together), "shared_expert", "mlp" (of a dense layer), or "rounding": in half
            precision, what the sums of the model itself lost.
        layer: its layer; missing for "embed" and "rounding".
        head: number of the head, or missing.
        expert: number of the routed expert, or missing. Experts that the token did not visit have no line.
        contribution: what the part adds to the logit.
        share: the contribution divided by the sum of all; NaN if that is 0.

    `attrs` say for plots what was split: `measure`, and the tokens `of` and `minus` if all rows have the same.

    Raises:
        KeyError: if a hook point that is needed was not recorded.
        IndexError: if no row has a token at a position, or the vocabulary has no such token.
        ValueError: if the parts do not make up the residual stream, as in a run that was patched between them.
    """
    missing = [name for name in needs(model) if name not in run]
    if missing:
        raise KeyError(
            f"{len(missing)} hook points are missing, {missing[0]} the first. "
            "Record the run with at=lab.tables.logit_attribution.needs(model)."
        )
    tokens = _asked(run, position)
    unembedding = Unembedding(model)
    final = at_tokens(run[needs(model)[-1]], tokens)
    directions = _directions(unembedding, run, of, minus)[tokens["row"].tolist()]
    split = Split(unembedding.through_norm(directions, final).double(), tokens)
    _add_parts(split, model, run)
    whole = (split.directions * final.double()).sum(-1)
    _check(split, whole, final.dtype)
    if final.dtype not in TOLERANCE:
        split.add("rounding", whole - split.total())
    table = split.table()
    what = "direction" if isinstance(of, Tensor) else "logit" if minus is None else "logit difference"
    table.attrs = {"measure": what, "of": _name(run, of, tokens), "minus": _name(run, minus, tokens)}
    return table


@dataclass
class Split:
    """The contributions found so far, one number for each asked token.

    Attributes:
        directions: For each asked token the direction of the residual stream that its logit grows with.
        tokens: The asked tokens, as `tokens_of` gives them.
        lines: Part, layer, head or expert, the tokens, and their contributions.
    """

    directions: Float[Tensor, "n d_model"]
    tokens: pd.DataFrame
    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, part: str, values: Float[Tensor, " n"], **which: int | np.ndarray) -> None:
        """Adds one number for each token; `which` has the layer, the head and the expert."""
        self.lines.append({"part": part, "line": np.arange(len(values)), "contribution": values.numpy(), **which})

    def along(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        """What vectors that were added to the residual stream contribute."""
        return (x.detach().cpu().double() * self.directions).sum(-1)

    def total(self) -> Float[Tensor, " n"]:
        """The sum of what was found, for each token."""
        return torch.tensor(sum(line["contribution"] for line in self.lines))

    def table(self) -> pd.DataFrame:
        """The lines, row by row and position by position, in the order of the forward pass."""
        numbers: dict[tuple, int] = {}  # all slots of a layer have one
        keys = [tuple(line.get(name) for name in ("part", "layer", "head")) for line in self.lines]
        orders = [numbers.setdefault(key, len(numbers)) for key in keys]
        parts = [pd.DataFrame(line).assign(order=order) for line, order in zip(self.lines, orders, strict=True)]
        table = pd.concat(parts, ignore_index=True)
        for column in ("row", "position", "token"):
            table[column] = self.tokens[column].to_numpy()[table["line"]]
        for column in ("layer", "head", "expert"):
            own = table[column] if column in table else pd.Series(np.nan, table.index)
            table[column] = own.astype("Int64")
        # A token that visits an expert by two slots has one line for it.
        same = ["line", "order", "row", "position", "token", "part", "layer", "head", "expert"]
        table = pd.DataFrame(table.groupby(same, dropna=False, sort=False, as_index=False)["contribution"].sum())
        whole = table.groupby("line")["contribution"].transform("sum")
        table["share"] = (table["contribution"] / whole).where(whole != 0)
        return table.sort_values(["line", "order", "expert"], ignore_index=True).loc[:, COLUMNS]


def _add_parts(split: Split, model: HookedPreTrainedModel, run: Run) -> None:
    tokens = split.tokens
    split.add("embed", split.along(at_tokens(run["embed_merged"], tokens)))
    for layer, block in enumerate(model.text.layers):
        name = f"layers.{layer}.feed_forward"
        heads, bias = _heads(
            split, block.self_attn.o_proj, at_tokens(run[f"layers.{layer}.self_attn.z"], tokens), model
        )
        for head, values in enumerate(heads.unbind(-1)):
            split.add("head", values, layer=layer, head=head)
        if bias is not None:
            split.add("bias", bias, layer=layer)
        if not hasattr(block.feed_forward, "router"):
            split.add("mlp", split.along(at_tokens(run[f"{name}.out"], tokens)), layer=layer)
            continue
        chosen = at_tokens(run[f"{name}.router.indices"], tokens).numpy()
        for slot, written in enumerate(at_tokens(run[f"{name}.experts.out"], tokens).unbind(1)):
            split.add("expert", split.along(written), layer=layer, expert=chosen[:, slot])
        split.add("shared_expert", split.along(at_tokens(run[f"{name}.shared_expert.out"], tokens)), layer=layer)


def _heads(
    split: Split, o_proj: nn.Linear, z: Float[Tensor, "n head d_head"], model: HookedPreTrainedModel
) -> tuple[Float[Tensor, "n head"], Float[Tensor, " n"] | None]:
    """What each head contributes, and the bias of the output projection."""
    _, num_heads, d_head = z.shape
    device, width = input_device(o_proj, model.device), num_heads * d_head
    bias = o_proj(torch.zeros(1, width, dtype=z.dtype, device=device)).cpu()
    alone = torch.eye(num_heads, dtype=z.dtype)[..., None]
    size, parts = max(1, CHUNK_NBYTES // (4 * num_heads * (width + bias.shape[-1]))), []
    for some, directions in zip(z.split(size), split.directions.split(size), strict=True):
        # The projection of z with all heads but one silenced: so it works, too, where the weights are offloaded.
        written = o_proj((some[:, None] * alone).flatten(-2).to(device)).cpu().double() - bias.double()
        parts.append(einsum(written, directions, "n head d_model, n d_model -> n head"))
    return torch.cat(parts), None if o_proj.bias is None else split.along(bias.expand(len(z), -1))


def _asked(run: Run, position: int | Sequence[int] | None) -> pd.DataFrame:
    """The lines of `tokens_of` at the asked positions."""
    tokens = tokens_of(run)
    if position is not None:
        asked = [position] if isinstance(position, int) else list(position)
        counted = [run.positions[each] if -len(run.positions) <= each < 0 else each for each in asked]
        lost = [each for each in counted if each not in set(tokens["position"])]
        if lost or not asked:
            raise IndexError(
                f"{f'Position {lost[0]}' if lost else 'No position'} was asked for; the run has tokens at positions "
                f"{tokens['position'].min()} to {tokens['position'].max()}."
            )
        tokens = tokens.loc[tokens["position"].isin(counted), :]
    return tokens.reset_index(drop=True)


def _directions(
    unembedding: Unembedding, run: Run, of: Tokens | Tensor, minus: Tokens | None
) -> Float[Tensor, "row d_model"]:
    """For each row of the prompt what its normed vectors are multiplied with."""
    rows, d_model = len(run.prompt), run["embed_merged"].shape[-1]
    if isinstance(of, Tensor):
        if of.shape not in ((d_model,), (rows, d_model)):
            raise ValueError(f"of has shape {list(of.shape)}; a direction is [{d_model}], or [{rows}, {d_model}].")
        directions = of.detach().float().cpu().expand(rows, d_model)
    else:
        directions = unembedding.directions(token_ids(of, run.prompt))
    return directions if minus is None else directions - unembedding.directions(token_ids(minus, run.prompt))


def _check(split: Split, whole: Float[Tensor, " n"], dtype: torch.dtype) -> None:
    sizes = torch.tensor(sum(np.abs(line["contribution"]) for line in split.lines))
    found = split.total()
    wrong = ((found - whole).abs() > TOLERANCE.get(dtype, HALF_TOLERANCE) * sizes).nonzero().flatten().tolist()
    if wrong:
        line = split.tokens.iloc[wrong[0]]
        raise ValueError(
            f"At row {line['row']}, position {line['position']} the parts sum to {float(found[wrong[0]]):.4g}, but the "
            f"residual stream gives {float(whole[wrong[0]]):.4g}.\nThe run was patched between them, or is of another "
            "model; attribute an unpatched run."
        )


def _name(run: Run, of: Tokens | Tensor | None, tokens: pd.DataFrame) -> str | None:
    """The token that is meant, for plots; None if the rows have different ones, or it is a direction."""
    if of is None or isinstance(of, Tensor):
        return None
    ids = token_ids(of, run.prompt)[tokens["row"].tolist()].unique().tolist()
    return token_strings(run.prompt.tokenizer, ids)[0] if len(ids) == 1 else None
