"""The logit lens: what the model would say if it ended at a place of the residual stream.

The vector of a token at a hook point goes through the final norm and the output matrix (nostalgebraist 2020,
"interpreting GPT: the logit lens"). A tuned lens moves it by an affine map before; see `llama4lab.TunedLens`.

Every function reads all hook points of the residual stream that a run has. Cut the run to read fewer tokens:
`run.cut(positions=-1)`.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.tokenizer import token_id, token_strings
from llama4lab.run.hook_names import layer_of
from llama4lab.run.residual_stream import LAST, kind_of, recorded_residuals
from llama4lab.run.residual_stream import RESIDUAL as RESIDUAL
from llama4lab.run.run import Run
from llama4lab.run.selection import Selector
from llama4lab.run.tuned_lens import TunedLens
from llama4lab.run.unembedding import Unembedding
from llama4lab.tables.token_index import at_tokens, tokens_of

ORDER = ["row", "depth", "position"]


@torch.no_grad()
def top_tokens(
    model: HookedPreTrainedModel, run: Run, k: int = 1, *, at: Selector | None = None, lens: TunedLens | None = None
) -> pd.DataFrame:
    """Gives the `k` most probable next tokens at every hook point of the residual stream and every token.

    Args:
        model: The model.
        run: A run with hook points of the residual stream, for example recorded with `at="layers.*.resid_post"`, or
            with all of them: `at=lab.tables.logit_lens.RESIDUAL`.
        k: How many tokens; all, if there are fewer.
        at: Which of the recorded hook points; all by default.
        lens: A tuned lens; by default the logit lens.

    Columns:
        lens: "logit" or "tuned".
        row: row of the prompt.
        hook_point: where the vector was read.
        kind: the last part of its name: "embed_merged", "resid_pre", "resid_mid", "resid_post", "final_norm".
        layer: its layer; missing for those of the whole model.
        depth: its number among the hook points of the table, from 0, in the order of the forward pass.
        position: position whose next token is expected.
        input: text of the token at that position.
        rank: 0 for the most probable.
        token_id: id of the expected token.
        token: its text.
        logit: its logit.
        log_prob: logarithm (base e) of its probability.
        prob: its probability.
        entropy: of the whole distribution, in nats.
        kl: Kullback-Leibler divergence from the model's own prediction to this one, in nats; NaN at positions that the
            run has no logits of.

    Raises:
        KeyError: if no hook point of the residual stream was recorded, or the lens was not fitted at one of them.
        ValueError: if `k` is less than 1.
    """
    if k < 1:
        raise ValueError(f"k={k} tokens were asked for; k is at least 1.")
    parts = []
    for lines, logits, final in _readings(model, run, at, lens):
        log_prob = logits.log_softmax(-1)
        best, ids = log_prob.topk(min(k, logits.shape[-1]), dim=-1)
        shown = ids.shape[1]
        table = lines.loc[lines.index.repeat(shown)].reset_index(drop=True)
        table["rank"] = np.tile(np.arange(shown), len(lines))
        table["token_id"] = ids.flatten().cpu().numpy()
        table["token"] = token_strings(run.prompt.tokenizer, ids.flatten().tolist())
        table = _with_scores(table, logits.gather(-1, ids), best)
        table["entropy"] = torch.special.entr(log_prob.exp()).sum(-1).cpu().numpy().repeat(shown)
        table["kl"] = _divergence(final, log_prob).cpu().numpy().repeat(shown)
        parts.append(table)
    return pd.concat(parts).sort_values([*ORDER, "rank"], ignore_index=True)


@torch.no_grad()
def trajectories(
    model: HookedPreTrainedModel,
    run: Run,
    tokens: str | int | Sequence[str | int],
    *,
    at: Selector | None = None,
    lens: TunedLens | None = None,
) -> pd.DataFrame:
    """Gives how chosen tokens fare from hook point to hook point, as next tokens of every token of the run.

    Args:
        model: The model.
        run: As for `top_tokens`.
        tokens: A token, as text or id, or several.
        at: Which of the recorded hook points; all by default.
        lens: A tuned lens; by default the logit lens.

    Columns:
        lens, row, hook_point, kind, layer, depth, position, input: as in `top_tokens`.
        token_id: id of the chosen token.
        token: its text.
        logit: its logit.
        log_prob: logarithm (base e) of its probability.
        prob: its probability.
        rank: how many tokens are more probable; 0 for the most probable.

    Raises:
        KeyError: if no hook point of the residual stream was recorded, or the lens was not fitted at one of them.
        ValueError: if text is not one token, or the prompt has no tokenizer to read it.
        IndexError: if the vocabulary has no such id.
    """
    asked = [tokens] if isinstance(tokens, str | int) else list(tokens)
    ids = _ids(asked, run.prompt.tokenizer, Unembedding(model).vocab)
    parts = []
    for lines, logits, _ in _readings(model, run, at, lens):
        chosen = logits[:, ids.to(logits.device)]
        table = lines.loc[lines.index.repeat(len(ids))].reset_index(drop=True)
        table["order"] = np.tile(np.arange(len(ids)), len(lines))
        table["token_id"] = np.tile(ids.numpy(), len(lines))
        table["token"] = token_strings(run.prompt.tokenizer, ids.tolist()) * len(lines)
        table = _with_scores(table, chosen, chosen - logits.logsumexp(-1, keepdim=True))
        ranks = [(logits > chosen[:, index, None]).sum(-1) for index in range(len(ids))]
        table["rank"] = torch.stack(ranks, dim=-1).flatten().cpu().numpy()
        parts.append(table)
    table = pd.concat(parts).sort_values([*ORDER, "order"], ignore_index=True)
    return table.drop(columns="order")


def _readings(
    model: HookedPreTrainedModel, run: Run, at: Selector | None, lens: TunedLens | None
) -> Iterator[tuple[pd.DataFrame, Float[Tensor, "line vocab"], Float[Tensor, "line vocab"]]]:
    """Lines of the table, their logits, and the model's own (NaN where the run has none), a chunk at a time."""
    names, tokens, unembedding = recorded_residuals(model, run, at), tokens_of(run), Unembedding(model)
    depth = {name: place for place, name in enumerate(names)}
    for normed in (False, True):
        group = [name for name in names if (name == LAST) == normed]
        for own in unembedding.chunks(len(group) * len(tokens)):
            number, line = np.divmod(np.arange(own.start, own.stop), len(tokens))
            parts = []
            for index in np.unique(number):
                x = at_tokens(run[group[index]], tokens.iloc[line[number == index]])
                parts.append(x if lens is None else lens.translated(group[index], x))
            logits = unembedding.logits(torch.cat(parts), normed=normed)
            lines = tokens.iloc[line][["row", "position", "token"]].rename(columns={"token": "input"})
            lines = lines.reset_index(drop=True).assign(hook_point=[group[index] for index in number])
            final = _final_logits(run, tokens.iloc[line]).to(logits.device)
            yield _described(lines, depth, "logit" if lens is None else "tuned"), logits, final


def _described(lines: pd.DataFrame, depth: dict[str, int], lens: str) -> pd.DataFrame:
    names = lines["hook_point"]
    lines = lines.assign(
        lens=lens,
        kind=[kind_of(name) for name in names],
        layer=pd.array([layer_of(name) for name in names], dtype="Int64"),
        depth=[depth[name] for name in names],
    )
    return lines.loc[:, ["lens", "row", "hook_point", "kind", "layer", "depth", "position", "input"]]


def _final_logits(run: Run, tokens: pd.DataFrame) -> Float[Tensor, "line vocab"]:
    """The model's own logits of some tokens."""
    index = {position: place for place, position in enumerate(run.logit_positions)}
    places = torch.tensor([index.get(position, -1) for position in tokens["position"]])
    if not run.logit_positions:
        return torch.full((len(tokens), run.logits.shape[-1]), torch.nan)
    batch = torch.tensor(tokens["batch_index"].to_numpy())
    device = run.logits.device
    final = run.logits.detach()[batch.to(device), places.clamp_min(0).to(device)].float()
    return final.masked_fill((places < 0).to(device)[:, None], torch.nan)


def _divergence(final: Float[Tensor, "line vocab"], log_prob: Float[Tensor, "line vocab"]) -> Float[Tensor, " line"]:
    target = final.log_softmax(-1)
    return (target.exp() * (target - log_prob)).sum(-1).clamp_min(0.0)  # rounding can bring it below


def _with_scores(
    table: pd.DataFrame, logit: Float[Tensor, "line token"], log_prob: Float[Tensor, "line token"]
) -> pd.DataFrame:
    columns = {"logit": logit, "log_prob": log_prob, "prob": log_prob.exp()}
    return table.assign(**{name: tensor.flatten().cpu().numpy() for name, tensor in columns.items()})


def _ids(tokens: Sequence[str | int], tokenizer: PreTrainedTokenizerFast | None, vocab: int) -> Int[Tensor, " token"]:
    ids = []
    for token in tokens:
        if isinstance(token, str) and tokenizer is None:
            raise ValueError(f"The token {token!r} was asked for, but there is no tokenizer. Give its id.")
        ids.append(token_id(tokenizer, token) if isinstance(token, str) and tokenizer is not None else token)
    wrong = [token for token in ids if not 0 <= token < vocab]
    if wrong or not ids:
        asked = f"token {wrong[0]}" if wrong else "no tokens"
        raise IndexError(f"The way of {asked} was asked for; the vocabulary has ids 0 to {vocab - 1}.")
    return torch.tensor(ids)
