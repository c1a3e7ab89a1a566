"""From values and slopes to estimates: the arithmetic of attribution patching, one hook point at a time."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.attention_change import ASKING, START, is_matching, key_change, query_change
from llama4lab.run.block_change import block_jump, block_of, dot, is_route, routed_change, wide
from llama4lab.run.counterparts import difference
from llama4lab.run.hook_names import beside
from llama4lab.run.sweep_axes import WORDS

FEATURES = (*WORDS["feature"], "vocab")


def kept_words(name: str, shape: str) -> list[str]:
    """The axes that the estimates of a hook point have: all but features. A row of router logits is one place."""
    return [word for word in shape.split() if word not in FEATURES and (word != "expert" or not is_route(name))]


@dataclass(frozen=True, eq=False)
class Estimates:
    """The two parts of every estimate.

    Attributes:
        model: The model.
        shapes: Hook point -> its shape in words.
        values: Hook point -> its tensors in the base run and, at the same places, in the source run.
        slopes: Hook point that is asked for -> slopes to use for it, by hook point.
    """

    model: HookedPreTrainedModel
    shapes: Mapping[str, str]
    values: Mapping[str, tuple[Tensor, Tensor]]
    slopes: Mapping[str, Mapping[str, Tensor]]

    def first_order(self, name: str) -> Float[Tensor, "..."]:
        """The difference of the two runs times the slope, summed over features; 0 for what has no slope."""
        base, source = self.values[name]
        if not base.is_floating_point():
            return torch.zeros(base.shape, device=base.device)
        terms = difference(source, base) * wide(self.slopes[name][name])
        return terms.sum(-1) if len(kept_words(name, self.shapes[name])) < terms.ndim else terms

    def jump(self, name: str) -> Float[Tensor, "..."]:
        """What the exact recomputation of a block adds to the first order."""
        block = block_of(name, len(self.model.text.layers))
        if is_route(name):
            return self._route_jump(name)
        if is_matching(name) and self._knows_attention(name):
            return self._matching_jump(name)
        if block is None:
            return torch.zeros_like(self.first_order(name))
        base, source = self.values[name]
        stream, delta = self.values[f"layers.{block}.resid_mid"][0], difference(source, base)
        slopes = [self.slopes[name][f"layers.{block}.resid_{place}"] for place in ("mid", "post")]
        if delta.ndim == 3:
            return block_jump(self.model, block, stream, delta, (slopes[0], slopes[1]))
        # Each head writes into the stream by itself.
        heads = [block_jump(self.model, block, stream, each, (slopes[0], slopes[1])) for each in delta.unbind(2)]
        return torch.stack(heads, dim=2)

    def _route_jump(self, name: str) -> Float[Tensor, "..."]:
        base, source = self.values[name]
        change = routed_change(self.model, name, self.values[beside(name, "resid_mid")][0], base, source)
        exact = dot(change, self.slopes[name][beside(name, "feed_forward.experts.out")])
        # The logits decide on all slots together; indices and gates on one slot each.
        return (exact.sum(-1) if name.endswith(".logits") else exact) - self.first_order(name)

    def _knows_attention(self, name: str) -> bool:
        """Whether all that the softmax needs was read, which it is not for aligned prompts."""
        known = all(beside(name, f"self_attn.{kind}") in self.values for kind in START)
        return known and beside(name, "self_attn.z") in self.slopes[name]

    def _matching_jump(self, name: str) -> Float[Tensor, "..."]:
        q, k = (beside(name, f"self_attn.{kind}_rot") for kind in "qk")
        v, scores = (self.values[beside(name, f"self_attn.{kind}")][0] for kind in ("v", "scores"))
        slope = self.slopes[name][beside(name, "self_attn.z")]
        if name.endswith(ASKING):
            exact = query_change(difference(*self.values[q][::-1]), self.values[k][0], v, wide(scores), slope)
        else:
            exact = key_change(difference(*self.values[k][::-1]), self.values[q][0], v, wide(scores), slope)
        return exact - self.first_order(name)

    def by_expert(self, name: str) -> Float[Tensor, "batch seq expert"]:
        """The first order at `experts.out` by expert: its part in the source run less its part in the base run."""
        total, count = 0.0, self.model.text.config.num_local_experts
        routes = self.values[beside(name, "feed_forward.router.indices")]
        for written, chosen, sign in zip(self.values[name], routes, (-1.0, 1.0), strict=True):
            parts = sign * dot(written, self.slopes[name][name])
            total = total + (parts[..., None] * F.one_hot(chosen, count)).sum(-2)
        assert isinstance(total, Tensor)
        return total
