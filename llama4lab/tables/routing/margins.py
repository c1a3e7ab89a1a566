"""How far each token is from the nearest border between two choices of the router."""

import numpy as np
import pandas as pd
import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.run import Run
from llama4lab.tables.token_index import at_tokens, tokens_of

ROUTER = "layers.{}.feed_forward.router"
AT = 'Record at=["layers.*.feed_forward.router.*", "layers.*.resid_mid"].'


@torch.no_grad()
def flip_distance(model: HookedPreTrainedModel, run: Run) -> pd.DataFrame:
    """Gives how little the input of a router would have to move for a token to go elsewhere.

    A router is linear, so that the border between experts e and e' is a plane, at the distance
    (z_e - z_e') / |w_e - w_e'| from the input x of the router (the normed residual stream). The nearest of all borders
    counts; it need not be that of the runner-up, whose logit is the closest, as router rows differ by unlike amounts.
    With several experts a token, it is the nearest border between any chosen and any other expert: beyond it, the set
    of the chosen ones is another.

    Args:
        model: The model.
        run: A run of it with `router.logits` and `router.indices` recorded, and `resid_mid` for `relative`.

    Columns:
        row: row of the prompt.
        layer: layer of the router.
        position: position in the row; padding is left out.
        token: text of the token.
        modality: "text", "image" or "special".
        expert: the chosen expert that the token would lose.
        nearest: the expert that it would get.
        margin: logit of `expert` minus that of `nearest`; negative for a token that was forced elsewhere.
        distance: how far away the border is; missing for a forced token, and if all experts are chosen.
        relative: that as a share of |x|; missing where `resid_mid` was not recorded.

    `attrs["num_experts"]` has the number of experts.

    Raises:
        KeyError: if router logits or indices were not recorded.
        ValueError: if the run is of a model with other routers.
    """
    layers = [layer for layer in run.meta["moe_layers"] if f"{ROUTER.format(layer)}.indices" in run]
    lacking = [layer for layer in layers if f"{ROUTER.format(layer)}.logits" not in run]
    if not layers or lacking:
        raise KeyError(f"Router {'logits' if lacking else 'indices'} were not recorded. {AT}")
    tokens, parts = tokens_of(run), []
    for layer in layers:
        logits, chosen = (at_tokens(run[f"{ROUTER.format(layer)}.{name}"], tokens) for name in ("logits", "indices"))
        table = tokens[["row", "position", "token", "modality"]].copy()
        table.insert(1, "layer", layer)
        for name, column in _borders(logits.double(), chosen.long(), _rows(model, layer, logits.shape[1])).items():
            table[name] = column
        table["relative"] = table["distance"] / _sizes(model, run, layer, tokens)
        parts.append(table)
    table = pd.concat(parts, ignore_index=True).sort_values(["row", "layer", "position"], ignore_index=True)
    for name in ("expert", "nearest"):
        table[name] = table[name].astype("Int64").mask(table["margin"].isna())
    table.attrs["num_experts"] = run.meta["num_experts"]
    return table


def _borders(
    logits: Float[Tensor, "token expert"], chosen: Int[Tensor, "token slot"], rows: Float[Tensor, "expert d_model"]
) -> dict[str, np.ndarray]:
    """The nearest border of each token."""
    taken = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    margins = logits.gather(1, chosen)[:, :, None] - logits[:, None]
    distances = margins / apart[chosen]
    # Rows that are equal have no border, and an expert barred by a logit of -inf is beyond none.
    open_ = ~taken[:, None] & torch.isfinite(distances)
    forced = (open_ & (margins < 0)).flatten(1).any(1)
    # Of a token that was forced elsewhere, the widest negative margin is the one to know.
    least = torch.where(forced[:, None, None], margins, distances).masked_fill(~open_, torch.inf).flatten(1)
    best, place = least.min(dim=1)
    slot, nearest = place // logits.shape[1], place % logits.shape[1]
    none = torch.isinf(best)
    each = torch.arange(len(logits))
    return {
        "expert": chosen[each, slot].numpy(),
        "nearest": nearest.numpy(),
        "margin": margins.flatten(1)[each, place].masked_fill(none, torch.nan).numpy(),
        "distance": best.masked_fill(none | forced, torch.nan).numpy(),
    }


def _rows(model: HookedPreTrainedModel, layer: int, num_experts: int) -> Float[Tensor, "expert d_model"]:
    router = getattr(model.text.layers[layer].feed_forward, "router", None)
    if router is None or router.out_features != num_experts:
        found = "no router" if router is None else f"{router.out_features} experts"
        raise ValueError(f"Layer {layer} of the run has {num_experts} experts, of the model {found}: it is another.")
    with align_module_device(router):
        return router.weight.detach().double().cpu()


def _sizes(model: HookedPreTrainedModel, run: Run, layer: int, tokens: pd.DataFrame) -> Float[np.ndarray, " token"]:
    """Norms of the inputs of a router."""
    name = f"layers.{layer}.resid_mid"
    if name not in run:
        return np.full(len(tokens), np.nan)
    norm = model.text.layers[layer].post_attention_layernorm
    with align_module_device(norm):
        x = norm(at_tokens(run[name], tokens).to(norm.weight.device, norm.weight.dtype))
    return x.double().norm(dim=-1).cpu().numpy()
