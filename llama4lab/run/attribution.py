"""Attribution patching: what patching each place would do, estimated for all of them at once.

A sweep runs the model once for every cell. The estimate needs the values of both runs and the slope of the metric in
the run that is patched: (source - base) times d metric / d value, place by place. Two forwards and one backward.

Slopes are blind in several ways, and each has its remedy:

- A router jumps. What a patched router sends elsewhere is computed: the routed experts of that layer run again on the
  base run's own input, with the new choice and the new gates, and the change of what they write meets the slope there.
- A softmax saturates. What a patched query or key changes in its own head is computed from the scores of the base run.
- A block bends. A patch of the residual stream, or of a term of it, is followed exactly through the feed-forward block
  that reads it next, change of route included.
- The metric bends over the whole distance between two prompts. With `steps`, slopes are averaged along a line.

The first three cost no pass of the model; the rest of it is taken as linear. So one thing stays unseen: a patch that
tips a router of a later block, or at another token, which was near a tie. Where single cells matter, sweep them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.attention_change import START, is_matching
from llama4lab.run.attribution_estimates import Estimates, kept_words
from llama4lab.run.attribution_result import Attribution
from llama4lab.run.block_change import ROUTER, block_of, is_route, routed_change, wide
from llama4lab.run.counterparts import check_counterparts, counterpart, difference
from llama4lab.run.hook_names import beside
from llama4lab.run.metric_gradients import differentiated
from llama4lab.run.metrics import Metric, as_metric
from llama4lab.run.pairing import Mapped, Pair, Side, other_side, paired
from llama4lab.run.selection import Selector, selected
from llama4lab.run.size import free_nbytes, recorded_nbytes

# With several steps, where slopes are taken: at the base run for what decides who is attended to; half-way of its own
# change for what is a part of a block; on the line between the inputs for all else.
AT_BASE = (".q", ".k", ".q_rot", ".k_rot", ".scores", ".pattern")
HALFWAY = (*ROUTER, ".experts.hidden", ".experts.out", ".shared_expert.hidden", ".shared_expert.out", ".v")
UPSTREAM = ("vision_model.", "image_features", "embed")  # before the place where images and tokens meet


def attribute(
    model: HookedPreTrainedModel,
    clean: Any,
    corrupted: Any,
    *,
    at: Selector,
    metric: Metric | Callable[[Tensor], Tensor],
    into: Side = "corrupted",
    steps: int = 1,
    align: Mapped | Sequence[Mapped] | None = None,
) -> Attribution:
    """Estimates the effect of patching every place of the chosen hook points.

    The estimates stand for the cells of `lab.sweep(model, clean, corrupted, at=at, over=..., metric=metric, into=into)`
    with single positions (and heads, slots, neurons, ...).

    With `steps=1` all slopes are those of the base run, from two forwards and one backward. That is good for small
    changes, and poor where a patch replaces most of what the model knows. With more steps,

    - what carries content takes slopes averaged over the midpoints of as many equal parts of the straight line between
      the inputs of the text layers in both runs (`embed_merged`; if hook points before it are asked for, token
      embeddings and image patches). It is the line of EAP-IG (Hanna, Pezzelle and Belinkov, 2024): n passes serve all
      hook points, where a line for each of them would need n passes each;
    - parts of a block (routers, single experts, values) take the slope where half of what their patch changes is done,
      at all tokens together: one more pass for each hook point of theirs that is asked for;
    - queries, keys, scores and patterns keep the slope of the base run.

    Args:
        model: The model. Its parameters are left as they are.
        clean: The prompts that the model answers as it should: a `Prompt`, or anything that `model.prompt` takes.
        corrupted: As many prompts, each the counterpart of a clean one.
        at: Names or globs of hook points.
        metric: One of `lab.metrics`, or a differentiable function of the logits. If it gives one number for the batch,
            the mean over the rows is the effect of patching a place in all of them.
        into: Which run would be patched: "corrupted" for denoising, "clean" for noising.
        steps: At how many points of the line to take slopes. 5 to 20 are usual: the more, the more sharply the metric
            depends on attention to a single token.
        align: As in `lab.sweep`. Tokens without a counterpart get 0.

    Raises:
        ValueError: if the prompts cannot be compared place by place, a name matches nothing, the metric has no
            derivative, or `steps` is less than 1.
        MemoryError: if the values of both runs and the slopes would not fit into the free memory.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} was asked for; slopes are taken at one point or more.")
    pair, points = paired(model, clean, corrupted, align), model.hook_points()
    names = selected(points, at)
    work = _Work(model, pair, into, names, metric, steps)
    shapes = {name: points[name] for name in work.read}
    check_counterparts(pair, shapes)
    work.check_memory()
    source = differentiated(model, work.source, metric, work.read)
    base = differentiated(model, work.base, metric, work.read, by=work.slopes(work.from_base))
    values = {
        name: (value, counterpart(pair, into, shapes[name], value, source.values[name]))
        for name, value in base.values.items()
    }
    slopes = dict.fromkeys(names, base.gradients)
    if steps > 1:
        slopes |= dict.fromkeys(work.along_line, work.averaged(values)) | work.halfway(values, base.gradients)
    estimates = Estimates(model, shapes, values, slopes)
    sides = {into: base.metric.cpu(), other_side(into): source.metric.cpu()}
    return Attribution(
        first_order={name: estimates.first_order(name).cpu() for name in names},
        jump={name: estimates.jump(name).cpu() for name in names},
        by_expert={name: estimates.by_expert(name).cpu() for name in names if name.endswith(".experts.out")},
        shapes={name: " ".join(kept_words(name, shapes[name])) for name in names},
        prompt=work.base,
        into=into,
        metric=as_metric(metric).name,
        steps=steps,
        clean=sides["clean"],
        corrupted=sides["corrupted"],
    )


@dataclass(frozen=True, eq=False)
class _Work:
    """What is to be read, and where slopes are needed."""

    model: HookedPreTrainedModel
    pair: Pair
    into: Side
    names: list[str]
    metric: Metric | Callable[[Tensor], Tensor]
    steps: int

    @property
    def base(self) -> Prompt:
        """The prompt that is patched."""
        return self.pair.prompt(self.into)

    @property
    def source(self) -> Prompt:
        """The prompt that values come from."""
        return self.pair.prompt(other_side(self.into))

    @property
    def line(self) -> list[str]:
        """The hook points at which the inputs move from the base run to the source."""
        if not any(name.startswith(UPSTREAM) and name != "embed_merged" for name in self.names):
            return ["embed_merged"]
        return ["embed"] if self.base.pixel_values is None else ["vision_model.patch_embed", "embed"]

    @property
    def read(self) -> list[str]:
        """The hook points whose values are needed: those asked for, and what the blocks that run again start from."""
        needed = [*self.names, *(self.line if self.steps > 1 else [])]
        for name in self.names:
            block = block_of(name, len(self.model.text.layers))
            if is_route(name):
                needed += [beside(name, "resid_mid"), beside(name, "feed_forward.experts.out")]
            elif block is not None:
                needed.append(f"layers.{block}.resid_mid")
            elif self._matches_exactly(name):
                needed += [beside(name, f"self_attn.{kind}") for kind in START]
            elif name.endswith(".experts.out"):
                needed.append(beside(name, "feed_forward.router.indices"))
        return list(dict.fromkeys(needed))

    @property
    def along_line(self) -> list[str]:
        """Those of the names that take slopes along the line between the inputs."""
        return [name for name in self.names if self.steps > 1 and not name.endswith(AT_BASE + HALFWAY)]

    @property
    def from_base(self) -> list[str]:
        """Those that need slopes of the base run; the first order of a router is that of the base run always."""
        return [name for name in self.names if self.steps == 1 or name.endswith(AT_BASE) or is_route(name)]

    def slopes(self, names: list[str]) -> list[str]:
        """The hook points whose slopes the estimates of the given ones need."""
        needed = []
        for name in names:
            if not name.endswith(".indices"):
                needed.append(name)
            block = block_of(name, len(self.model.text.layers))
            if is_route(name):
                needed.append(beside(name, "feed_forward.experts.out"))
            elif self._matches_exactly(name):
                needed.append(beside(name, "self_attn.z"))
            elif block is not None:
                needed += [f"layers.{block}.resid_mid", f"layers.{block}.resid_post"]
        return list(dict.fromkeys(needed))

    def halfway(
        self, values: Mapping[str, tuple[Tensor, Tensor]], slopes: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """For each part of a block, the slope where half of what its patch changes is done, at all tokens together."""
        found = {}
        for name in [name for name in self.names if name.endswith(HALFWAY)]:
            base, source = values[name]
            put, change = name, difference(source, base)
            if is_route(name):
                put = beside(name, "feed_forward.experts.out")
                change = routed_change(self.model, name, values[beside(name, "resid_mid")][0], base, source)
            inputs = {put: wide(values[put][0]) + change / 2}
            run = differentiated(self.model, self.base, self.metric, (), by=[put], inputs=inputs)
            found[name] = {**slopes, **run.gradients}
        return found

    def _matches_exactly(self, name: str) -> bool:
        """Whether the softmax is run again: not for prompts that are aligned, whose keys stand elsewhere."""
        return is_matching(name) and self.pair.alike

    def averaged(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Slopes at the midpoints of equal parts of the line between the inputs, averaged."""
        by, total = self.slopes(self.along_line), {}
        for step in range(self.steps if by else 0):
            share = (step + 0.5) / self.steps
            inputs = {name: wide(values[name][0]).lerp(wide(values[name][1]), share) for name in self.line}
            found = differentiated(self.model, self.base, self.metric, (), by=by, inputs=inputs).gradients
            total = {name: total.get(name, 0.0) + wide(slope) / self.steps for name, slope in found.items()}
        return total

    def check_memory(self) -> None:
        """Refuses what would not fit: the values of both runs and the slopes."""
        need, free = 3 * recorded_nbytes(self.model, self.base, self.read), free_nbytes(self.model.device)
        if need > free:
            raise MemoryError(
                f"The values and slopes would take {need / 2**30:.1f} GiB on {self.model.device}, where "
                f"{free / 2**30:.1f} GiB are free.\nTake fewer hook points at a time, or shorter prompts."
            )
