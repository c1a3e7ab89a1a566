"""How far a model is from a reference on the same tokens: in its residual stream and logits, and in its routing."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.run import Run
from llama4lab.tables.routing.choices import decisions
from llama4lab.tables.routing.stability import saturation
from llama4lab.tables.token_index import at_tokens, tokens_of

RESIDUAL = "layers.*.resid_post"
ROUTER = ("layers.*.feed_forward.router.logits", "layers.*.feed_forward.router.indices")
CHUNK = 64  # tokens whose probabilities are in memory together
TOKENS = 48
TEXT = (
    "The capital of France is Paris, and 12 + 30 = 42. When Mary met John at the station, John gave her a letter.\n"
    "def area(width, height):\n    return width * height\nEl perro come pan. Once upon a time there was a red square."
)


def sample_prompt(model: HookedPreTrainedModel) -> Prompt:
    """Gives a short text of prose, sums, code and another language; without a tokenizer, ids across the vocabulary."""
    if model.tokenizer is not None:
        return model.prompt(TEXT)
    text = model.config.get_text_config()
    eos = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    step = max(1, text.vocab_size // (2 * TOKENS))
    ids = list(range(0, text.vocab_size, step))
    kinds = model.prompter.describe(ids)[1]
    control = {text.bos_token_id, text.pad_token_id, *eos}
    usable = [token for token, kind in zip(ids, kinds, strict=True) if kind == "text" and token not in control]
    # Not in order, as no text is.
    return model.prompt([usable[7 * place % len(usable)] for place in range(min(TOKENS, len(usable)))])


def check_same_architecture(model: HookedPreTrainedModel, reference: HookedPreTrainedModel) -> None:
    """Raises ValueError if two models cannot be compared layer by layer."""
    both = []
    for each in (model, reference):
        known = facts(each.config)
        keys = ("num_layers", "d_model", "num_experts", "top_k", "moe_layers")
        both.append({key: known[key] for key in keys} | {"vocab_size": each.config.get_text_config().vocab_size})
    for key, own in both[0].items():
        if own != both[1][key]:
            raise ValueError(f"The model has {key} {own!s:.60}, the reference {both[1][key]!s:.60}: it is another one.")


def parity(run: Run, reference: Run) -> pd.DataFrame:
    """Gives how far one run is from another of the same tokens; see `verify` for the columns."""
    tokens, lines = tokens_of(reference), []
    for layer, values in reference.layers("resid_post").items():
        name = f"layers.{layer}.resid_post"
        lines.append({"at": name, "layer": layer, **_errors(at_tokens(run[name], tokens), at_tokens(values, tokens))})
    ours, theirs = at_tokens(run.logits, tokens), at_tokens(reference.logits, tokens)
    divergence = torch.cat([_kl(q, p) for q, p in zip(ours.split(CHUNK), theirs.split(CHUNK), strict=True)])
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    lines.append({"at": "logits", "layer": None, **_errors(ours, theirs)})
    lines[-1] |= {"kl_mean": float(divergence.mean()), "kl_max": float(divergence.max()), "top1_agreement": float(same)}
    return pd.DataFrame(lines).astype({"layer": "Int64"})


def routing(run: Run, reference: Run) -> pd.DataFrame:
    """Gives how far the routers of one run choose as those of another; see `verify` for the columns."""
    tokens, flips = tokens_of(reference), []
    margins = decisions(reference).drop_duplicates(["row", "layer", "position"])
    for layer, chosen in reference.layers("feed_forward.router.indices").items():
        name = f"layers.{layer}.feed_forward.router.indices"
        ours, theirs = (at_tokens(each, tokens).sort(-1).values for each in (run[name], chosen))
        moved = (ours != theirs).any(-1).numpy()
        # `decisions` has the tokens of a layer in the order of `tokens_of`, and one line each by now.
        margin = margins.loc[margins["layer"] == layer, "margin"].to_numpy()
        flips.append({"layer": layer, "flips": int(moved.sum()), "margin": float(np.median(margin))})
        flips[-1]["largest_flip"] = float(margin[moved].max()) if moved.any() else float("nan")
    return saturation(reference, run).merge(pd.DataFrame(flips), on="layer")


def _errors(own: Float[Tensor, "token d"], other: Float[Tensor, "token d"]) -> dict[str, float]:
    apart, size = (own.double() - other.double()), other.double().norm(dim=-1)
    # A mean over tokens: the first token of a text is often so large that a norm over all would show it alone.
    relative = apart.norm(dim=-1) / size.clamp(min=torch.finfo(torch.float64).tiny)
    found = {"relative_error": float(relative.mean()), "largest_relative_error": float(relative.max())}
    return found | {"max_abs_difference": float(apart.abs().max())}


def _kl(own: Float[Tensor, "token vocab"], reference: Float[Tensor, "token vocab"]) -> Float[Tensor, " token"]:
    """Divergence of `own` from `reference`, in nats."""
    p, q = reference.double().log_softmax(-1), own.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)
