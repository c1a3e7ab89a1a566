"""What one expert is for: its tokens, what it writes, its neurons, and what its router looks for."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportOptionalOperand=false

from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama4lab.model.moe import MixtureOfExperts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.tokenizer import token_strings
from llama4lab.run.corpus.stats import RoutingStats
from llama4lab.run.routes.expert_outputs import routed_layers
from llama4lab.run.run import Run
from llama4lab.run.unembedding import Unembedding, input_device
from llama4lab.tables.routing.expert_vocabulary import npmi
from llama4lab.tables.token_index import at_tokens, tokens_of

PROMOTED = 5  # tokens that are shown of a neuron
SMOOTHING = 1.0  # choices that are added to those of each token, spread as all are; as in `vocabulary`
MODULE = "layers.{}.feed_forward."


@dataclass(frozen=True, eq=False)
class ExpertCard:
    """Small tables about one expert.

    Attributes:
        layer: Its layer.
        expert: Its number.
        tokens: How many tokens were sent to it.
        inputs: Tokens that it gets, the most characteristic first. Columns: token, token_id, tokens, share (of the
            token's occurrences), npmi (of token and expert, smoothed as in `vocabulary`). Image tokens are left out.
            Empty where statistics did not count the vocabulary of the layer.
        promoted: Tokens whose logit its mean write raises most, by the final norm and the output matrix. Columns:
            token, token_id, score (logit above the mean of all tokens). Empty for an expert without tokens.
        neurons: Its strongest neurons. Columns: neuron, activation (mean of its size; missing for statistics of a
            corpus), norm (of what it writes at an activation of 1), promoted (the tokens that it promotes with the sign
            that it mostly has; as it is in the weights, for statistics). They are ordered by activation times norm, or
            by norm.
        direction: Tokens along its router row, less the mean row of all experts, with the norm before the router.
            Columns: side ("embedding": tokens whose embedding would be sent to it; "unembedding": tokens that the
            direction would promote), token, token_id, score (standard deviations above the mean of all tokens).
    """

    layer: int
    expert: int
    tokens: int
    inputs: pd.DataFrame
    promoted: pd.DataFrame
    neurons: pd.DataFrame
    direction: pd.DataFrame


@torch.no_grad()
def expert_card(
    model: HookedPreTrainedModel, source: Run | RoutingStats, *, layer: int, expert: int, k: int = 8
) -> ExpertCard:
    """Gathers what is known about one expert.

    Args:
        model: The model.
        source: A run of it with `router.indices`, `experts.out` and `experts.hidden` of the layer recorded; or
            statistics of a corpus, best counted with `vocabulary=True`, which know no neurons.
        layer: Layer of the expert.
        expert: Its number.
        k: How many lines each table has at most.

    Raises:
        IndexError: if there is no such layer or expert.
        KeyError: if something was not recorded.
        ValueError: if the layer has no experts, or k is not positive.
    """
    routed_layers(model, layer)
    block = cast(MixtureOfExperts, model.text.layers[layer].feed_forward)
    count = block.router.out_features
    if not 0 <= expert < count:
        raise IndexError(f"Expert {expert} was asked for; layer {layer} has experts 0 to {count - 1}.")
    if k < 1:
        raise ValueError(f"k={k} lines were asked for; at least 1 is possible.")
    words = _Words(model, source, k)
    if isinstance(source, RoutingStats):
        if layer not in source.layers:
            raise KeyError(f"The statistics have no layer {layer}; they have {', '.join(map(str, source.layers))}.")
        place, slots = source.layers.index(layer), source.top_k
        tokens = int(source.arrays["choices"][:, :, place, :, expert].sum())
        write, hidden, inputs = source.writes[place, expert], None, _counted_words(source, layer)
    else:
        chosen, written, hidden = _recorded(source, layer, expert)
        tokens, write, slots = int((chosen == expert).sum()), written.double().sum(0), chosen.shape[1]
        inputs = _words_of_run(source, chosen, count)
    promoted = words.best(words.logits((write / max(tokens, 1)).float()[None], normed=False))[0]
    neurons = _neurons(block, expert, hidden, words)
    return ExpertCard(
        layer,
        expert,
        tokens,
        inputs=words.named(_inputs(*inputs, expert, slots).head(k)),
        promoted=promoted if tokens else promoted.iloc[:0],
        neurons=neurons,
        direction=_direction(model, layer, expert, words),
    )


class _Words:
    """The vocabulary of a model, and which of it some scores put first."""

    def __init__(self, model: HookedPreTrainedModel, source: Run | RoutingStats, k: int):
        tokenizer = source.prompt.tokenizer if isinstance(source, Run) else None
        self.tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        self.texts: dict[int, str] = {} if isinstance(source, Run) else source.token_texts
        self.unembedding, self.k = Unembedding(model), k

    def logits(self, x: Float[Tensor, "n d_model"], *, normed: bool) -> Float[Tensor, "n vocab"]:
        """Logits, each less their mean; of vectors before the final norm or behind it."""
        found = self.unembedding.logits(x, normed=normed).cpu()
        return found - found.mean(-1, keepdim=True)

    def best(self, scores: Float[Tensor, "n vocab"], k: int | None = None) -> list[pd.DataFrame]:
        """For each line the tokens with the highest scores."""
        top = scores.topk(min(k or self.k, scores.shape[-1]), dim=-1)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [self.named(pd.DataFrame({"token_id": ids, "score": values})) for ids, values in pairs]

    def named(self, table: pd.DataFrame) -> pd.DataFrame:
        """Puts the text of each token before its id."""
        ids = table["token_id"].tolist()
        texts = token_strings(self.tokenizer, ids)
        if self.tokenizer is None:
            texts = [self.texts.get(token, text) for token, text in zip(ids, texts, strict=True)]
        table = table.reset_index(drop=True)
        table.insert(0, "token", texts)
        return table


def _recorded(
    run: Run, layer: int, expert: int
) -> tuple[Int[Tensor, "token slot"], Float[Tensor, "n d_model"], Float[Tensor, "n d_ff"]]:
    """The choices of all tokens, and of those of the expert what it wrote and its neurons."""
    names = [MODULE.format(layer) + name for name in ("router.indices", "experts.out", "experts.hidden")]
    lacking = [name for name in names if name not in run]
    if lacking:
        raise KeyError(f"{lacking[0]!r} was not recorded. Record the run with at={names}.")
    chosen, out, hidden = (at_tokens(run[name], tokens_of(run)) for name in names)
    return chosen, out[chosen == expert], hidden[chosen == expert]


def _words_of_run(
    run: Run, chosen: Int[Tensor, "token slot"], count: int
) -> tuple[Int[np.ndarray, " id"], Int[np.ndarray, "id expert"]]:
    """The text tokens of a run, and how often each went to each expert."""
    tokens = tokens_of(run)
    text = (tokens["modality"] != "image").to_numpy()
    ids = run.prompt.input_ids.cpu().numpy()[tokens["row"], tokens["position"]][text]
    known, number = np.unique(ids, return_inverse=True)
    counts = np.zeros((len(known), count), dtype=np.int64)
    np.add.at(counts, (number[:, None], chosen.numpy()[text]), 1)
    return known.astype(np.int64), counts


def _counted_words(stats: RoutingStats, layer: int) -> tuple[Int[np.ndarray, " id"], Int[np.ndarray, "id expert"]]:
    if layer not in stats.words:
        return np.zeros(0, dtype=np.int64), np.zeros((0, stats.num_experts), dtype=np.int64)
    counts = stats.vocabulary_counts("input")[stats.words.index(layer)]
    ids = np.flatnonzero(counts.sum(axis=1))
    return ids, counts[ids].astype(np.int64)


def _inputs(ids: Int[np.ndarray, " id"], counts: Int[np.ndarray, "id expert"], expert: int, slots: int) -> pd.DataFrame:
    """The tokens of an expert, the most characteristic first."""
    own, seen, every = counts[:, expert], counts.sum(axis=1), np.arange(len(ids))
    association = npmi(counts, every, np.full(len(ids), expert), SMOOTHING)
    table = pd.DataFrame(
        {"token_id": ids, "tokens": own, "share": own / np.maximum(seen / slots, 1), "npmi": association}
    )
    kept = table[table["tokens"] > 0]
    return kept.sort_values(["npmi", "tokens", "token_id"], ascending=[False, False, True])


def _neurons(
    block: MixtureOfExperts, expert: int, hidden: Float[Tensor, "n d_ff"] | None, words: _Words
) -> pd.DataFrame:
    """The strongest neurons of an expert, and what they promote."""
    with align_module_device(block.experts):
        down = block.experts.down_proj[expert].detach().float().cpu()
    norm = down.norm(dim=-1)
    if hidden is None or not len(hidden):
        activation, sign = torch.full_like(norm, torch.nan if hidden is None else 0.0), torch.ones_like(norm)
        strength = norm
    else:
        activation, sign = hidden.float().abs().mean(0), torch.where(hidden.float().mean(0) < 0, -1.0, 1.0)
        strength = activation * norm
    best = strength.topk(min(words.k, len(strength))).indices
    promoted = words.best(words.logits(sign[best, None] * down[best], normed=False), PROMOTED)
    columns = {"neuron": best.numpy(), "activation": activation[best].numpy(), "norm": norm[best].numpy()}
    return pd.DataFrame(columns | {"promoted": [each["token"].tolist() for each in promoted]})


def _direction(model: HookedPreTrainedModel, layer: int, expert: int, words: _Words) -> pd.DataFrame:
    """Tokens along what the router looks for."""
    block = model.text.layers[layer]
    router, norm = cast(MixtureOfExperts, block.feed_forward).router, block.post_attention_layernorm
    with align_module_device(router), align_module_device(norm):
        rows = router.weight.detach().float().cpu()
        direction = (rows[expert] - rows.mean(0)) * norm.weight.detach().float().cpu()
    embed = model.get_input_embeddings()
    assert isinstance(embed, nn.Module)
    place = input_device(embed, model.device)
    scores = []
    for own in words.unembedding.chunks(words.unembedding.vocab):
        vectors = embed(torch.arange(own.start, own.stop, device=place)).float().cpu()
        scores.append(vectors @ direction / vectors.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny))
    final = words.unembedding.norm
    with align_module_device(final):
        outward = direction * final.weight.detach().float().cpu()
    sides = {"embedding": torch.cat(scores)[None], "unembedding": words.logits(outward[None], normed=True)}
    parts = []
    for side, score in sides.items():
        table = words.best((score - score.mean()) / score.std().clamp(min=torch.finfo(torch.float32).tiny))[0]
        table.insert(0, "side", side)
        parts.append(table)
    return pd.concat(parts, ignore_index=True)
