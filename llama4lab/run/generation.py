"""Generating text while watching hook points at every step."""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.generated_prompt import Ending
from llama4lab.run.generation_steps import GenerationSteps, Step
from llama4lab.run.recording import as_prompt
from llama4lab.run.run import Run
from llama4lab.run.selection import Selector, selected

# Options of transformers that would take the steps apart from the tokens, and what to do instead.
REFUSED = {
    "num_beams": "Beams move rows between steps; repeat the prompt and sample instead.",
    "num_return_sequences": "Several sequences a prompt are more rows than the prompt has; repeat the prompt instead.",
    "prompt_lookup_num_tokens": "Guessed tokens are read before it is known whether they stay.",
    "assistant_model": "Guessed tokens are read before it is known whether they stay.",
    "return_dict_in_generate": "A run is given; its logits and hook points hold what such a result would.",
}


def generate(
    model: HookedPreTrainedModel,
    prompt: Any,
    *,
    max_new_tokens: int = 20,
    at: Selector = (),
    to: str | torch.device | None = None,
    each_step: Callable[[Step], bool | None] | None = None,
    passing: Selector = (),
    **options: Any,
) -> Run:
    """Generates with transformers' `generate` and keeps the chosen tensors of every step.

    Tensors of all steps are joined along their sequence axis, so they cover the prompt and every new token but the
    last, which the model never reads. Scores and patterns are aligned on a common key axis; keys that a chunked layer
    had dropped have pattern 0 and score -inf. The run's `prompt` holds the new tokens too, its `logits` are those from
    which each new token was chosen, before sampling options changed them.

    Args:
        model: The model.
        prompt: A `Prompt`, or anything that `model.prompt` takes.
        max_new_tokens: How many tokens at most; rows that end earlier are filled up with padding.
        at: Names or globs of hook points.
        to: Where to keep the tensors; by default each stays on its device.
        each_step: Called after every step with what it gave, a `Step`; generation ends if it returns True.
        passing: Hook points whose tensors only `each_step` gets, from the second step on: of single new tokens, so
            that patterns are small however long the prompt is.
        options: For transformers' `generate`, for example `do_sample=True, top_p=0.9`. Greedy by default.

    Raises:
        ValueError: for options that take the steps apart from the tokens, such as beams; for a cache that is not empty;
            or a name that matches no hook point.
        RuntimeError: if a chosen hook point never fires.
    """
    prompt = as_prompt(model, prompt)
    points = model.hook_points()
    _check(model, options, recording=bool(selected(points, at) or selected(points, passing)))
    kept: dict[str, list[Tensor]] = {name: [] for name in selected(points, at)}
    steps = GenerationSteps(model, prompt, kept, selected(points, passing), to, _ending(model, options))
    counting = _AfterStep(steps, each_step)
    options = _defaults(options, max_new_tokens)
    options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), counting])
    with torch.no_grad(), steps.listening():
        sequences = cast(Any, model).generate(**prompt.to(model.device).inputs(), **options)
    steps.check()
    return steps.run(sequences)


class _AfterStep(StoppingCriteria):
    """What transformers calls when a step has chosen its tokens; it asks the caller whether to go on."""

    def __init__(self, steps: GenerationSteps, each_step: Callable[[Step], bool | None] | None):
        self.steps, self.each_step = steps, each_step

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Bool[Tensor, " batch"]:
        step = self.steps.take(input_ids)
        stop = self.each_step is not None and bool(self.each_step(step))
        if step.number == 0 and self.steps.passing:
            with self.steps.away():
                pass  # what is passing is listened to from now on
        return torch.full(input_ids.shape[:1], stop, dtype=torch.bool, device=input_ids.device)


def _check(model: HookedPreTrainedModel, options: dict[str, Any], *, recording: bool) -> None:
    for name, advice in REFUSED.items():
        value = _option(model, options, name)
        if value not in (None, False, 0) and (value != 1 or not name.startswith("num_")):
            raise ValueError(f"{name} was asked for, and steps cannot be recorded with it.\n{advice}")
    if recording and _option(model, options, "use_cache") is False:
        raise ValueError(
            "use_cache=False was asked for, and hook points to record: every step would read the whole text again.\n"
            "Leave one out, or record the text once: lab.record(model, run.prompt.input_ids, at=...)."
        )
    for name in ("cache", "past_key_values"):
        if options.get(name) is not None and options[name].get_seq_length() > 0:
            raise ValueError(f"{name} holds tokens already, whose tensors are gone.\nGive an empty cache, or none.")


def _option(model: HookedPreTrainedModel, options: dict[str, Any], name: str) -> Any:
    """An option as transformers will take it: given itself, in a config that was given, or in the model's."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given


def _ending(model: HookedPreTrainedModel, options: dict[str, Any]) -> Ending:
    ends = _option(model, options, "eos_token_id")
    tokens = torch.as_tensor([] if ends is None else ends, dtype=torch.long).flatten().tolist()
    other = _option(model, options, "stop_strings") is not None or bool(options.get("stopping_criteria"))
    return Ending(tuple(tokens), _option(model, options, "pad_token_id") if other else None)


def _defaults(options: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    greedy = {} if "generation_config" in options else {"do_sample": False}
    return {**greedy, "max_new_tokens": max_new_tokens, **options}
