"""Generating text while watching hook points at every step."""

from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.listening import listening, silent
from llama4lab.run.recording import as_prompt
from llama4lab.run.run import Run
from llama4lab.run.selection import Selector, selected


def generate(
    model: HookedPreTrainedModel,
    prompt: Any,
    *,
    max_new_tokens: int = 20,
    at: Selector = (),
    to: str | torch.device | None = None,
    **options: Any,
) -> Run:
    """Generates with transformers' `generate` and keeps the chosen tensors of every step.

    Tensors of all steps are joined along their sequence axis, so they cover the prompt and every new token but the
    last, which the model never reads. Scores and patterns are aligned on a common key axis; keys that a chunked layer
    had dropped have pattern 0 and score -inf. The run's `prompt` holds the new tokens too, its `logits` are those from
    which each new token was chosen.

    Args:
        model: The model.
        prompt: A `Prompt`, or anything that `model.prompt` takes.
        max_new_tokens: How many tokens at most; rows that end earlier are filled up with padding.
        at: Names or globs of hook points.
        to: Where to keep the tensors; by default each stays on its device.
        options: For transformers' `generate`, for example `do_sample=True, top_p=0.9`. Greedy by default.

    Raises:
        ValueError: for beams, whose rows change places between the steps; or a name that matches no hook point.
        RuntimeError: if a chosen hook point never fires.
    """
    prompt = as_prompt(model, prompt)
    if options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1:
        raise ValueError("Beams and several sequences a prompt move rows between steps; repeat the prompt instead.")
    names = selected(model.hook_points(), at)
    steps: dict[str, list[Tensor]] = {name: [] for name in {*names, "logits"}}

    def keeper(name: str):
        def keep(tensor: Tensor) -> None:
            # Only the last position of the prompt chooses a token.
            kept = tensor[:, -1:] if name == "logits" else tensor
            steps[name].append(kept if to is None else kept.to(to))

        return keep

    options = {"do_sample": False, "max_new_tokens": max_new_tokens, **options}
    listeners = {name: keeper(name) for name in steps}
    with torch.no_grad(), listening(model, listeners) as fired:
        sequences = cast(Any, model).generate(**prompt.to(model.device).inputs(), **options)
    silent(names, fired, images=prompt.pixel_values is not None)
    logits = torch.cat(steps.pop("logits"), dim=1)
    points = model.hook_points()
    shapes = {name: points[name] for name in names}
    tensors = {name: _joined(steps[name], shapes[name].split(), name) for name in names}
    whole = extended(model, prompt, sequences[:, prompt.input_ids.shape[1] :].cpu())
    positions = list(range(whole.input_ids.shape[1] - 1))
    chosen_from = positions[-logits.shape[1] :]
    meta = facts(model.config, model.text)
    return Run(tensors, shapes, logits, whole, meta, positions=positions, logit_positions=chosen_from)


def extended(model: HookedPreTrainedModel, prompt: Prompt, new: Int[Tensor, "batch new"]) -> Prompt:
    """The prompt with generated tokens behind it; what fills up a row that has ended is padding."""
    ended = _after_end(new, model.generation_config.eos_token_id)
    tokens, modality = [], []
    for ids, over in zip(new.tolist(), ended.tolist(), strict=True):
        texts, kinds = model.prompter.describe(ids)
        tokens.append(["" if done else text for text, done in zip(texts, over, strict=True)])
        modality.append(["pad" if done else kind for kind, done in zip(kinds, over, strict=True)])
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, new], dim=1),
        attention_mask=torch.cat([prompt.attention_mask, (~ended).to(prompt.attention_mask.dtype)], dim=1),
        tokens=[old + more for old, more in zip(prompt.tokens, tokens, strict=True)],
        modality=[old + more for old, more in zip(prompt.modality, modality, strict=True)],
    )


def _after_end(new: Int[Tensor, "batch new"], ends: int | list[int] | None) -> Tensor:
    """Which tokens come after a token that ends the text."""
    ending = torch.isin(new, torch.tensor([] if ends is None else ends, dtype=new.dtype)).long()
    return ending.cumsum(1) - ending > 0


def _joined(steps: list[Tensor], words: list[str], name: str) -> Tensor:
    if "query" in words and words[0] == "batch":
        total, seen, fill = sum(step.shape[2] for step in steps), 0, -torch.inf if name.endswith(".scores") else 0.0
        aligned = []
        for step in steps:
            seen += step.shape[2]
            first = max(seen - step.shape[3], 0)
            step = step[..., :seen]
            aligned.append(torch.nn.functional.pad(step, (first, total - first - step.shape[3]), value=fill))
        return torch.cat(aligned, dim=2)
    return torch.cat(steps, dim=words.index("seq")) if "seq" in words else steps[0]
