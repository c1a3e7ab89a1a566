"""What happened at each generated token: how it was chosen, which experts it went to, and where it looked.

A token is *chosen* in one step and *read* in the next: `tokens` is about its choice, `experts` and `attention` are
about the step that read it. The last token of a generation was never read.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.facts import chunk_sizes, rotary_kind
from llama4lab.prompt.tokenizer import token_strings
from llama4lab.run.run import Run
from llama4lab.tables.query_summaries import looks, pattern_rows
from llama4lab.tables.routing.choices import decisions
from llama4lab.tables.token_index import places, tokens_of

PATTERN, Q_ROT, K_ROT = "self_attn.pattern", "self_attn.q_rot", "self_attn.k_rot"


def tokens(run: Run) -> pd.DataFrame:
    """Gives one line for each generated token; what fills up a row that has ended is left out.

    Probabilities are those of the model itself. Sampling options, such as a temperature, choose by others.

    Args:
        run: A run that `generate` gave.

    Columns:
        row: row of the prompt.
        step: which step chose it, from 0.
        position: position of the token; it was chosen from the logits of the position before.
        token_id: id of the token.
        token: its text.
        modality: "text", "image" or "special".
        prob: the probability that the model gave it.
        log_prob: logarithm (base e) of it; `-log_prob` is the surprisal in nats.
        entropy: of the distribution that it was chosen from, in nats; the surprisal to expect.
        rank: how many tokens were more probable; 0 is what greedy decoding takes.
        best: text of the most probable token.
        best_prob: its probability.

    Raises:
        ValueError: if the run was not generated.
    """
    known = _generated(run)
    batch, step, chosen = (_tensor(known[name]) for name in ("batch_index", "step_index", "token_id"))
    log_prob = run.logits.detach().cpu()[batch, step].double().log_softmax(dim=-1)
    own = log_prob.gather(1, chosen[:, None])
    best_prob, best = log_prob.max(dim=-1)
    return known[["row", "step", "position", "token_id", "token", "modality"]].assign(
        prob=own.exp().squeeze(-1).numpy(),
        log_prob=own.squeeze(-1).numpy(),
        entropy=torch.special.entr(log_prob.exp()).sum(-1).numpy(),
        rank=(log_prob > own).sum(-1).numpy(),
        best=token_strings(run.prompt.tokenizer, best.tolist()),
        best_prob=best_prob.exp().numpy(),
    )


def experts(run: Run) -> pd.DataFrame:
    """Gives the experts of each generated token that was read: `tables.routing.decisions` of these tokens.

    Args:
        run: A run that `generate` gave, with `at="layers.*.feed_forward.router.*"`.

    Columns:
        row, layer, position, slot: the place.
        step: which step chose the token, from 0; the next one read it.
        token, modality, expert, logit, gate, margin, entropy, runner_up: as in `tables.routing.decisions`, with its
            further columns where their hook points were recorded.

    `attrs["num_experts"]` has the number of experts.

    Raises:
        ValueError: if the run was not generated.
        KeyError: if router logits or indices were not recorded.
    """
    table, first = decisions(run), _first_generated(run)
    own = table.loc[table["position"] >= first, :].reset_index(drop=True)
    own.insert(4, "step", own["position"] - first)
    own.attrs = table.attrs
    return own


def attention(run: Run) -> pd.DataFrame:
    """Gives where each generated token that was read looked, for each layer and head.

    Chunks are those of the chunked layers in every layer, as in `tables.attention.mass`.

    Args:
        run: A run that `generate` gave, with `layers.*.self_attn.pattern`; or, which takes far less memory after a
            long prompt, with `layers.*.self_attn.q_rot` and `layers.*.self_attn.k_rot`.

    Columns:
        row: row of the prompt.
        step: which step chose the token, from 0; the next one read it.
        position: position of the token.
        token: its text.
        layer: the layer.
        kind: "rope" or "nope".
        head: the query head.
        own_chunk: attention to keys of the token's own chunk (everything, in a model without chunks).
        earlier: attention to keys of earlier chunks.
        first_token: attention to the first token of the row.
        itself: attention to its own position.
        distance: mean distance of what it looked at, in tokens without padding.
        entropy: of the attention over keys, in nats.

    Raises:
        ValueError: if the run was not generated, or queries and keys of a layer are given that bars single keys.
        KeyError: if neither patterns nor queries and keys were recorded.
    """
    first = _first_generated(run)
    known = tokens_of(run)
    known = known.loc[known["position"] >= first, :].reset_index(drop=True)
    place, row_places = _tensor(known["place"]), torch.as_tensor(places(run))
    parts = []
    for layer, pattern in _patterns(run, known).items():
        key_place = row_places[_tensor(known["row"]), : pattern.shape[-1]]
        found = looks(pattern, place, key_place, run.meta["chunk_size"])
        heads = pattern.shape[1]
        columns = {"layer": layer, "kind": rotary_kind(run.meta, layer), "head": np.tile(np.arange(heads), len(known))}
        columns |= {name: values.reshape(-1).cpu().numpy() for name, values in found.items()}
        repeated = known[["row", "position", "token"]].loc[known.index.repeat(heads)].reset_index(drop=True)
        repeated.insert(1, "step", repeated["position"] - first)
        parts.append(repeated.assign(**columns))
    table = pd.concat(parts, ignore_index=True)
    return table.sort_values(["row", "step", "layer", "head"], ignore_index=True)


def _first_generated(run: Run) -> int:
    """The position of the first generated token."""
    first = run.meta.get("generated_from")
    if first is None:
        raise ValueError("This run was recorded, not generated, so no token of it was chosen.\nUse lab.generate.")
    return first


def _generated(run: Run) -> pd.DataFrame:
    """One line for each generated token whose logits the run has, row by row."""
    first, mask = _first_generated(run), run.prompt.attention_mask.cpu()
    parts = []
    for batch, row in enumerate(run.rows):
        kept = [(index, place + 1) for index, place in enumerate(run.logit_positions) if mask[row, place + 1]]
        own = pd.DataFrame(kept, columns=["step_index", "position"], dtype="int64")
        own.insert(0, "batch_index", batch)
        own.insert(1, "row", row)
        own["step"] = own["position"] - first
        own["token_id"] = run.prompt.input_ids[row].cpu().numpy()[own["position"].to_numpy()]
        own["token"] = [run.prompt.tokens[row][place] for place in own["position"]]
        own["modality"] = [run.prompt.modality[row][place] for place in own["position"]]
        parts.append(own)
    return pd.concat(parts, ignore_index=True)


def _patterns(run: Run, known: pd.DataFrame) -> dict[int, Float[Tensor, "token head key"]]:
    """The attention of some tokens in every layer of which there are patterns, or queries and keys."""
    batch, seq = (_tensor(known[name]) for name in ("batch_index", "seq_index"))
    if any(name.endswith(PATTERN) and name.startswith("layers.") for name in run):
        recorded = run.layers(PATTERN).items()
        return {layer: pattern[batch.to(pattern.device), :, seq.to(pattern.device)] for layer, pattern in recorded}
    if not any(name.endswith(Q_ROT) and name.startswith("layers.") for name in run):
        raise KeyError('No attention was recorded. Generate with at=["layers.*.self_attn.[qk]_rot"], or with patterns.')
    queries, keys, sizes = run.layers(Q_ROT), run.layers(K_ROT), chunk_sizes(run.meta)
    _check_whole(run, list(queries))
    row_places, found = torch.as_tensor(places(run)), {}
    for layer, q in queries.items():
        parts = []
        for index, row in enumerate(run.rows):
            own = known.loc[known["batch_index"] == index, :]
            place, key_place = _tensor(own["place"]), row_places[row, : len(run.positions)]
            vectors = q[index, _tensor(own["seq_index"]).to(q.device)].detach()
            parts.append(pattern_rows(vectors, keys[layer][index].detach(), place, key_place, sizes[layer]))
        found[layer] = torch.cat(parts)
    return found


def _tensor(column: Any) -> Tensor:
    return torch.tensor(np.asarray(column, dtype=np.int64).copy())


def _check_whole(run: Run, layers: list[int]) -> None:
    barred = sorted(set(layers) & set(run.meta.get("barred_layers", [])))
    if barred:
        raise ValueError(f"Layer {barred[0]} bars single keys, which queries and keys do not show.\nRecord patterns.")
    if run.positions != list(range(len(run.positions))):
        raise ValueError("The run was cut, and attention needs the keys of all positions before.\nUse the whole run.")
