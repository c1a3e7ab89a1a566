"""Whether a loaded model is its checkpoint, and how far it is from another: above all in what its routers choose."""

from pathlib import Path
from typing import Any

from llama4lab.model.loading import empty_model, load, opened
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.recording import as_prompt, record
from llama4lab.tables.routing.stability import drift
from llama4lab.tables.verification.coverage import stored_tensors
from llama4lab.tables.verification.parity import (
    RESIDUAL,
    ROUTER,
    check_same_architecture,
    parity,
    routing,
    sample_prompt,
)
from llama4lab.tables.verification.report import Verification
from llama4lab.tables.verification.spot_checks import checked_numbers, chosen, uncounted


def verify(
    model: HookedPreTrainedModel,
    *,
    reference: HookedPreTrainedModel | str | Path | None = None,
    prompt: Any = None,
    matrices: int | None = 8,
    seed: int = 0,
) -> Verification:
    """Checks a model against the checkpoint that it was loaded from, and measures its distance from a reference.

    Did every tensor go where it belongs? Are the numbers right? The checkpoint is opened once more, and what the model
    uses now is compared with the numbers that a second decoder makes of the bytes on disk: every vector and router, and
    some matrices, mostly of experts. So a weight that was edited in memory, one in the wrong slot, or a file that was
    replaced after loading shows. Of offloaded weights only the chosen ones are read, past `model.store`, which stays as
    it is.

    With a reference, for example the checkpoint before it was quantized, both run the same tokens.

    Args:
        model: A model that `load` gave, however it was placed or quantized.
        reference: Another one of the same architecture, or what `load` takes to give it.
        prompt: What both run: anything that `model.prompt` takes; a short text, or token ids, by default.
        matrices: How many matrices are checked, besides vectors and routers; None checks all.
        seed: Of the choice of matrices.

    Returns:
        A `Verification`, with `ok` and the tables below; it shows itself as text.

        tensors: one line for each tensor on disk. Columns:
            file: name of its file; of several that have a share of it, the first.
            tensor: its name on disk; of tensors that Meta's ranks share out, that of the whole in the model.
            dtype: in which it is stored; of packed blocks, their kind.
            shape: its shape as text, "[8, 128]".
            bytes: its size.
            role: "weight", "bias", "scale", "zero point", "offset", "table", "settings", "shape" or "order of columns".
            read_by: the tensor of the model that it is a part of, or "activations only (not used)"; "" if none is.
        matrices: one line for each tensor whose numbers were looked at. Columns:
            name: of the tensor in the model.
            expert: which expert's matrix of it, [out, in]; missing for other tensors.
            scheme: how it is stored, as the second decoder sees it.
            rounded_to: what it was rounded to while loading (`quantize=`); "" if it was not.
            shape: its shape as text.
            max_abs_difference: the largest difference of a number from that on disk.
            relative_error: |used - stored| / |stored|, over the whole matrix.
            equal: whether all numbers are equal, to the last bit of the model's dtype.
            ok: whether they are right: equal, or, if rounded, no further away than rounding explains.
        parity: one line for each layer, and one for the logits. Columns:
            at: the hook point.
            layer: the layer; missing for the logits.
            relative_error: |own - reference| / |reference| of a token, mean over tokens.
            largest_relative_error: of the worst token.
            max_abs_difference: the largest difference of a number.
            kl_mean, kl_max: divergence of the next token's probabilities from the reference's, in nats; logits only.
            top1_agreement: share of tokens after which both expect the same token most; logits only.
        routing: one line for each router. Columns:
            layer: layer of the router.
            tokens: how many were compared.
            agreement: mean share of a token's experts that it has in both.
            chance: the agreement if the two had chosen independently.
            flips: how many tokens have not the same experts.
            margin: median margin of the reference; see `tables.routing.decisions`.
            largest_flip: the largest margin of the reference at which a token went elsewhere; missing without flips.
        drift: agreement by the reference's margin, as in `tables.routing.drift`.

    Raises:
        ValueError: if the model was not loaded from a checkpoint, if `matrices` is negative, or if the reference is of
            another architecture.
        FileNotFoundError: if the checkpoint is not there any more.
    """
    if model.folder is None:
        raise ValueError(
            "The model was not loaded from a checkpoint, so that there is nothing to verify it against.\n"
            "Load one: lab.load(folder)."
        )
    if matrices is not None and matrices < 0:
        raise ValueError(f"matrices={matrices} were to be checked; give 0 or more, or None for all.")
    empty = empty_model(model.folder)
    weights = opened(model.folder, empty)
    shapes = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    numbers = checked_numbers(model, weights.shards, shapes, chosen(shapes, matrices, seed))
    found = Verification(model.folder, stored_tensors(weights), numbers)
    if reference is not None:
        other = reference if isinstance(reference, HookedPreTrainedModel) else load(reference)
        _compare(found, model, other, prompt)
    return found


def _compare(found: Verification, model: HookedPreTrainedModel, reference: HookedPreTrainedModel, prompt: Any) -> None:
    """Runs both models and adds the tables about their distance."""
    check_same_architecture(model, reference)
    tokens = sample_prompt(model) if prompt is None else as_prompt(model, prompt)
    routers = [name for name in ROUTER if any(name.endswith("router.logits") for name in model.hook_points())]
    with uncounted(model), uncounted(reference):
        own, other = (record(each, tokens, [RESIDUAL, *routers], to="cpu") for each in (model, reference))
    found.tokens = int(tokens.attention_mask.sum())
    found.parity = parity(own, other)
    if routers:
        found.routing, found.drift = routing(own, other), drift(other, own)
