"""How much routed experts, the shared expert and attention write, and what they add to a logit."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportOptionalOperand=false

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.run import Run
from llama4lab.run.unembedding import Tokens
from llama4lab.tables import logit_attribution
from llama4lab.tables.token_index import at_tokens, tokens_of

ROUTED, SHARED, ATTENTION = "feed_forward.experts.out", "feed_forward.shared_expert.out", "self_attn.out"
KINDS = {"expert": "routed", "shared_expert": "shared"}


def contributions(run: Run) -> pd.DataFrame:
    """Compares what the routed experts, the shared expert and attention write: a line for each row, layer and position.

    Record the run with `at=["layers.*.feed_forward.experts.out", "layers.*.feed_forward.shared_expert.out",
    "layers.*.self_attn.out"]`; of attention's, layers may be left out. The writes are as they enter the residual
    stream. The gate is in them: Llama 4 scales the input of a routed expert by it, so it is no factor on the write.

    Columns:
        row: row of the prompt.
        layer: layer with experts.
        position: position in the row; padding is left out.
        token: text of the token.
        modality: "text", "image" or "special".
        routed_norm: L2 norm of what its routed experts wrote together.
        shared_norm: of what the shared expert wrote.
        attention_norm: of what attention wrote in this layer; missing where it was not recorded.
        cosine: between the routed and the shared write; missing if one of them is 0.
        routed_share: `routed_norm / (routed_norm + shared_norm)`: a half where both write as much.

    Raises:
        KeyError: if the writes of routed or shared experts were not recorded.
    """
    if not run.meta["moe_layers"]:
        raise KeyError("This model has no routed experts: all its layers are dense.")
    routed, shared = run.layers(ROUTED), run.layers(SHARED)
    if routed.keys() != shared.keys():
        lacking = ", ".join(map(str, sorted(routed.keys() ^ shared.keys())))
        raise KeyError(f'Of layers {lacking} one is missing. Record at="layers.*.{ROUTED}" and "layers.*.{SHARED}".')
    tokens, parts = tokens_of(run), []
    for layer in sorted(routed):
        together = at_tokens(routed[layer], tokens).double().sum(1)
        beside = at_tokens(shared[layer], tokens).double()
        table = tokens[["row", "position", "token", "modality"]].copy()
        table.insert(1, "layer", layer)
        table["routed_norm"], table["shared_norm"] = _norm(together), _norm(beside)
        table["attention_norm"] = _attention(run, layer, tokens)
        table["cosine"] = cosines(together, beside)
        whole = table["routed_norm"] + table["shared_norm"]
        table["routed_share"] = (table["routed_norm"] / whole).where(whole > 0)
        parts.append(table)
    return pd.concat(parts, ignore_index=True).sort_values(["row", "layer", "position"], ignore_index=True)


def expert_attribution(
    model: HookedPreTrainedModel,
    run: Run,
    of: Tokens | Float[Tensor, "... d_model"],
    versus: Tokens | None = None,
    *,
    position: int | Sequence[int] | None = -1,
) -> pd.DataFrame:
    """Gives what each routed and shared expert adds directly to a logit, or to a difference of two.

    These are the lines of experts in `tables.logit_attribution.contributions`; the rest of the logit is there.

    Args:
        model: The model.
        run: A run recorded with `at=lab.tables.logit_attribution.needs(model)`.
        of: The token (text or id) whose logit it is, or one for each row; or a direction.
        versus: A token whose logit is taken off, or one for each row.
        position: The position whose next token it is, -1 is the last one; several; or None for all tokens.

    Columns:
        row: row of the prompt.
        position: position whose next token it is about.
        token: text of the token at that position.
        layer: layer of the expert.
        kind: "routed" or "shared".
        expert: number of the routed expert; missing for the shared one. Experts that the token did not visit have no
            line.
        contribution: what it adds to the logit.
        share: the contribution as a share of the whole logit, all other parts of the model included.

    `attrs` are those of `logit_attribution.contributions`.

    Raises:
        KeyError: if a hook point that is needed was not recorded.
        IndexError: if there is no such position or token.
    """
    whole = logit_attribution.contributions(model, run, of, versus, position=position)
    table = whole[whole["part"].isin(list(KINDS))].reset_index(drop=True)
    table.insert(4, "kind", table["part"].map(KINDS))
    table = table[["row", "position", "token", "layer", "kind", "expert", "contribution", "share"]]
    table.attrs = dict(whole.attrs)
    return table


def sizes_of_writes(run: Run, layer: int, tokens: pd.DataFrame) -> dict[str, np.ndarray]:
    """The columns of `decisions` about writes, of shape [token] or [token, slot], as far as they were recorded."""
    columns, found = {}, {}
    for column, name in (("routed_norm", ROUTED), ("shared_norm", SHARED), ("attention_norm", ATTENTION)):
        if f"layers.{layer}.{name}" in run:
            found[name] = at_tokens(run[f"layers.{layer}.{name}"], tokens).double()
            columns[column] = _norm(found[name])
    if ROUTED in found and SHARED in found:
        columns["cosine"] = cosines(found[ROUTED], found[SHARED][:, None])
    return columns


def cosines(a: Float[Tensor, "... d_model"], b: Float[Tensor, "... d_model"]) -> Float[np.ndarray, "..."]:
    """Cosines along the last axis; NaN where a vector is 0."""
    sizes = a.norm(dim=-1) * b.norm(dim=-1)
    return ((a * b).sum(-1) / sizes.masked_fill(sizes == 0, float("nan"))).clamp(-1, 1).numpy()


def _norm(x: Float[Tensor, "... d_model"]) -> Float[np.ndarray, "..."]:
    return x.norm(dim=-1).numpy()


def _attention(run: Run, layer: int, tokens: pd.DataFrame) -> Float[np.ndarray, " token"]:
    name = f"layers.{layer}.{ATTENTION}"
    return _norm(at_tokens(run[name], tokens).double()) if name in run else np.full(len(tokens), np.nan)
