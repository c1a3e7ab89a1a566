"""Edge attribution patching: what swapping each edge of the graph would do, estimated for all of them at once.

An edge goes from what one part writes into the residual stream to what a later part reads of it (see
`llama4lab.run.graph.nodes`). To swap it is to let that one reader see what the writer wrote in the other run; it is
what `patch_paths` does exactly, in a pass for each edge. The estimate is (source - base) of the writer times the
derivative of the metric with respect to what the reader reads: EAP (Syed, Rager and Conmy, 2023). Two forwards and one
backward serve all edges. With more steps, derivatives are averaged along the line between the inputs: EAP-IG (Hanna,
Pezzelle and Belinkov, 2024).

A router jumps, and a derivative does not see it. Where a writer would send a token to another expert, the experts of
that layer run again for this token, and the change of what they write meets the derivative there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.config_parts import text_part
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.block_change import wide
from llama4lab.run.edge_attribution import EdgeAttribution
from llama4lab.run.graph.nodes import Graph, graph_of
from llama4lab.run.graph.recorded_pass import RecordedPass, recorded_pass
from llama4lab.run.graph.route_jumps import route_jumps
from llama4lab.run.graph.slopes import Slope, Slopes, slopes
from llama4lab.run.metrics import Metric, as_metric
from llama4lab.run.pairing import Side, other_side, paired


def attribute_edges(
    model: HookedPreTrainedModel,
    clean: Any,
    corrupted: Any,
    *,
    metric: Metric | Callable[[Tensor], Tensor],
    into: Side = "corrupted",
    steps: int = 1,
    by_position: bool = False,
) -> EdgeAttribution:
    """Estimates the effect of swapping every edge.

    Args:
        model: The model. Its parameters are left as they are.
        clean: The prompts that the model answers as it should: a `Prompt`, or anything that `model.prompt` takes.
        corrupted: As many prompts, token by token the counterparts of the clean ones.
        metric: One of `lab.metrics`, or a differentiable function of the logits.
        into: Which run's edges would be swapped for those of the other: "corrupted" for what restores the answer,
            "clean" for what spoils it.
        steps: At how many midpoints of equal parts of the line between the inputs of the text layers to take
            derivatives; 1 for those of the base run alone, which is cheap and often far off. 5 are mostly enough.
            Edges into routers keep the derivative of the base run, as a swap of one leaves all other routes alone.
        by_position: Whether to keep the estimates of each position; else their sum.

    Raises:
        ValueError: if the prompts cannot be compared position by position, the metric has no derivative, or `steps` is
            less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} was asked for; derivatives are taken at one point or more.")
    pair = paired(model, clean, corrupted)
    other = other_side(into)
    base, source = (recorded_pass(model, pair.prompt(side), metric) for side in (into, other))
    work = _Work(graph_of(text_part(model.config)), base, source, by_position)
    here = slopes(model, base, base.embedded)
    jump = work.jumps(model, here)
    if steps == 1:
        first_order = work.first_order(here)
    else:
        first_order = torch.zeros_like(jump)
        for step in range(steps):
            between = base.embedded.lerp(source.embedded, (step + 0.5) / steps)
            first_order += work.first_order(slopes(model, base, between)) / steps
        routers = torch.tensor([node.part == "router" for node in work.graph.receivers])
        first_order = torch.where(routers, work.first_order(here), first_order)
    values = {into: base.values.cpu(), other: source.values.cpu()}
    return EdgeAttribution(
        graph=work.graph,
        first_order=first_order,
        jump=jump,
        prompt=base.prompt,
        into=into,
        metric=as_metric(metric).name,
        steps=steps,
        clean=values["clean"],
        corrupted=values["corrupted"],
    )


@dataclass(frozen=True, eq=False)
class _Work:
    """Two runs and their graph."""

    graph: Graph
    base: RecordedPass
    source: RecordedPass
    by_position: bool

    def differences(self, before: int) -> Iterator[tuple[slice, Float[Tensor, "row seq sender d_model"]]]:
        """For each earlier stage where its senders stand, and source less base of what they write."""
        for stage in range(-1, before):
            base = self.base.written[stage]
            yield self.graph.block("sender", stage), wide(self.source.written[stage]).to(base.device) - wide(base)

    def empty(self) -> Float[Tensor, "row seq sender receiver"]:
        """Zeros for every edge, on the CPU."""
        batch, seq = self.base.prompt.input_ids.shape
        return torch.zeros(batch, seq if self.by_position else 1, *self.graph.edges.shape)

    def first_order(self, found: Slopes) -> Float[Tensor, "row seq sender receiver"]:
        """Differences times slopes, summed over features and, if positions are not kept, over positions."""
        total = self.empty()
        for slope in found.of:
            place = self.graph.block("receiver", slope.stage, slope.part)
            for senders, difference in self.differences(slope.stage):
                terms = self._terms(difference, slope)
                total[:, :, senders, place] = (terms if self.by_position else terms.sum(1, keepdim=True)).cpu()
        return total

    def _terms(self, difference: Tensor, slope: Slope) -> Float[Tensor, "row seq sender receiver"]:
        difference = difference.to(slope.gradient.device)
        terms = torch.einsum("bsud,bsrd->bsur", difference, slope.gradient)
        if slope.indices is None:
            return terms
        count = self.graph.block("receiver", slope.stage, "expert")
        experts = F.one_hot(slope.indices, count.stop - count.start)
        return torch.einsum("bsuk,bske->bsue", terms, experts.to(terms.dtype))

    def jumps(self, model: HookedPreTrainedModel, found: Slopes) -> Float[Tensor, "row seq sender receiver"]:
        """What changes of route add to the edges into routers."""
        total = self.empty()
        for slope in found.of:
            if slope.part != "router":
                continue
            layer, place = slope.stage // 2, self.graph.block("receiver", slope.stage, "router")
            for senders, difference in self.differences(slope.stage):
                stream = found.streams[layer]
                difference = difference.to(stream.device)
                first_order = self._terms(difference, slope).squeeze(-1)
                jumps = route_jumps(model.text.layers[layer], stream, difference, found.routed[layer], first_order)
                jumps = jumps if self.by_position else jumps.sum(1, keepdim=True)
                total[:, :, senders, place] = jumps.unsqueeze(-1).cpu()
        return total
