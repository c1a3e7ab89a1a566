"""What the model expects next: the best tokens at a position, and how an intervention moved them."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llama4lab.prompt.tokenizer import token_id, token_strings
from llama4lab.run.run import Run
from llama4lab.tables.token_index import places


def top_tokens(
    run: Run, k: int = 5, position: int = -1, *, tokenizer: PreTrainedTokenizerFast | None = None
) -> pd.DataFrame:
    """Gives the `k` most probable next tokens at a position of every row that has a token there.

    Args:
        run: The run.
        k: How many tokens; all, if there are fewer.
        position: Position in the prompt; -1 is the last one the run has logits of.
        tokenizer: What writes tokens as text; that of the prompt by default, and without any a token is `<id>`.

    Columns:
        row: row of the prompt.
        position: position whose next token is expected.
        rank: 0 for the most probable.
        token_id: id of the token.
        token: its text.
        logit: its logit.
        log_prob: logarithm (base e) of its probability.
        prob: its probability.

    Raises:
        IndexError: if the run has no logits of that position, or only padding is there.
        ValueError: if `k` is less than 1.
    """
    _check_count(k)
    position, rows, logits = _at(run, position)
    log_prob, ids = logits.log_softmax(dim=-1).topk(min(k, logits.shape[-1]), dim=-1)
    shown = ids.shape[1]
    return pd.DataFrame(
        {
            "row": [row for row in rows for _ in range(shown)],
            "position": position,
            "rank": list(range(shown)) * len(rows),
            "token_id": ids.flatten().numpy(),
            "token": token_strings(tokenizer or run.prompt.tokenizer, ids.flatten().tolist()),
            "logit": logits.gather(1, ids).flatten().numpy(),
            "log_prob": log_prob.flatten().numpy(),
            "prob": log_prob.exp().flatten().numpy(),
        }
    )


def compare(
    before: Run,
    after: Run,
    tokens: Sequence[str | int] | None = None,
    *,
    k: int = 5,
    position: int = -1,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> pd.DataFrame:
    """Gives the probabilities of next tokens in two runs, at the same position of the same rows.

    Args:
        before: The first run, for example of the model as it is.
        after: The second, for example of the patched model.
        tokens: Which tokens, as text or ids; by default those among the first `k` of either run.
        k: How many of each run, if `tokens` does not say which.
        position: Position in the prompt; -1 is the last one the runs have logits of.
        tokenizer: As in `top_tokens`; also reads `tokens`.

    Columns:
        row: row of the prompt.
        position: position whose next token is expected.
        token_id: id of the token.
        token: its text.
        prob_before: its probability in the first run.
        prob_after: its probability in the second run.
        difference: `prob_after - prob_before`.

    Lines are sorted by the larger of the two probabilities, row by row; with `tokens`, they are in that order.

    Raises:
        ValueError: if the runs differ in rows, vocabulary or length, or `k` is less than 1.
    """
    tokenizer = tokenizer or before.prompt.tokenizer
    place, rows, was = _at(before, position)
    other_place, other_rows, now = _at(after, position)
    _check_alike((place, rows, was.shape[-1]), (other_place, other_rows, now.shape[-1]))
    asked = None if tokens is None else [_id(token, tokenizer, was.shape[-1]) for token in tokens]
    parts = []
    for row, prob, new_prob in zip(rows, was.softmax(dim=-1), now.softmax(dim=-1), strict=True):
        ids = _leading(prob, new_prob, k) if asked is None else torch.tensor(asked, dtype=torch.long)
        columns = {"row": row, "position": place, "token_id": ids.numpy()}
        columns |= {"token": token_strings(tokenizer, ids.tolist())}
        columns |= {"prob_before": prob[ids].numpy(), "prob_after": new_prob[ids].numpy()}
        parts.append(pd.DataFrame(columns))
    table = pd.concat(parts, ignore_index=True)
    table["difference"] = table["prob_after"] - table["prob_before"]
    return table


def _check_alike(before: tuple[int, list[int], int], after: tuple[int, list[int], int]) -> None:
    if before != after:
        raise ValueError(
            "The two runs cannot be compared: they differ in position, rows or size of the vocabulary.\n"
            f"Before: position {before[0]}, rows {before[1]}, {before[2]} tokens. "
            f"After: position {after[0]}, rows {after[1]}, {after[2]} tokens."
        )


def _check_count(k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k} tokens were asked for; k is at least 1.")


def _at(run: Run, position: int) -> tuple[int, list[int], Float[Tensor, "row vocab"]]:
    """The position counted from 0, the rows that have a token there, and their logits."""
    positions = run.logit_positions
    if position < 0 and len(positions) >= -position:
        position = positions[position]
    if position not in positions:
        known = f"{positions[0]} to {positions[-1]}" if positions else "none"
        raise IndexError(f"Position {position} was asked for; the run has logits of positions {known}.")
    has_token = places(run)[:, position] >= 0
    kept = [index for index, row in enumerate(run.rows) if has_token[row]]
    if not kept:
        raise IndexError(f"Position {position} is padding in all rows of the run.")
    logits = run.logits[kept, positions.index(position)].detach().double().cpu()
    return position, [run.rows[index] for index in kept], logits


def _leading(before: Float[Tensor, " vocab"], after: Float[Tensor, " vocab"], k: int) -> Int[Tensor, " token"]:
    _check_count(k)
    k = min(k, len(before))
    ids = torch.cat([before.topk(k).indices, after.topk(k).indices]).unique()
    return ids[torch.maximum(before, after)[ids].argsort(descending=True, stable=True)]


def _id(token: str | int, tokenizer: PreTrainedTokenizerFast | None, vocab: int) -> int:
    if isinstance(token, str):
        if tokenizer is None:
            raise ValueError(f"The token {token!r} was asked for, but there is no tokenizer. Give its id.")
        token = token_id(tokenizer, token)
    if not 0 <= token < vocab:
        raise IndexError(f"Token {token} was asked for; the vocabulary has ids 0 to {vocab - 1}.")
    return token
