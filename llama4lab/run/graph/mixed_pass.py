"""The mixed pass: some edges of the graph carry the source run's value, all others what their sender writes now.

The input of a receiver is the residual stream, plus for every swapped edge what its sender wrote in the source run less
what it has written in this pass. Everything is computed anew from its mixed input, layer by layer. With no edge swapped
that is the base run. With all edges swapped every receiver reads what it read in the source run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.block_change import wide
from llama4lab.run.graph.branches import Change, Reading, branched
from llama4lab.run.graph.contributions import contributions
from llama4lab.run.graph.nodes import Graph
from llama4lab.run.graph.recorded_pass import RecordedPass, values_of
from llama4lab.run.listening import listening
from llama4lab.run.size import free_nbytes

MOST_TOKENS = 8192  # of one pass; beyond this a call of a layer gains no speed
SHARE = 0.25  # of the free memory that a pass may take


@dataclass(frozen=True, eq=False)
class Mixing:
    """What all mixed passes of two runs have in common.

    Attributes:
        model: The model.
        graph: Its graph.
        base: The run whose inputs are run.
        source: The run that swapped edges take values from.
        frozen_routing: Whether all tokens keep the experts and gates of the base run.
    """

    model: HookedPreTrainedModel
    graph: Graph
    base: RecordedPass
    source: RecordedPass
    frozen_routing: bool = False

    def values(
        self, variants: list[Bool[Tensor, "sender receiver"]]
    ) -> Iterator[tuple[list[int], Float[Tensor, "variant row"]]]:
        """The metric of every row of the base prompt under each variant, some variants at a time.

        Args:
            variants: For each the edges that are swapped.

        Yields:
            The numbers of the variants that were run, and their values. Those that begin late come last.
        """
        stages = torch.tensor([node.stage for node in self.graph.receivers])
        begin = [int(stages[swapped.any(0)].min()) // 2 if bool(swapped.any()) else -1 for swapped in variants]
        for number, start in enumerate(begin):
            if start < 0:
                yield [number], self.base.values.unsqueeze(0)
        order = sorted((number for number, start in enumerate(begin) if start >= 0), key=begin.__getitem__)
        while order:
            start = begin[order[0]]
            some, order = order[: self._count(start)], order[self._count(start) :]
            yield some, self._run(torch.stack([variants[number] for number in some]), start)

    def _count(self, start: int) -> int:
        """How many variants fit into one pass that begins at a layer."""
        tokens = self.base.embedded[..., 0].numel()
        config, width = self.model.text.config, self.base.embedded.shape[-1]
        kept = sum(written.shape[2] for stage, written in self.base.written.items() if stage >= 2 * start)
        # Branches of the widest block: their inputs, norms, and all heads of each.
        branches = config.num_attention_heads * (3 * width + 2 * config.num_attention_heads * config.head_dim)
        token = 4 * (width * (2 * kept + 8) + branches) + 8 * config.intermediate_size_mlp
        fitting = int(SHARE * free_nbytes(self.base.embedded.device) / token)
        return max(min(MOST_TOKENS, fitting) // tokens, 1)

    @torch.no_grad()
    def _run(self, swapped: Bool[Tensor, "variant sender receiver"], start: int) -> Float[Tensor, "variant row"]:
        """One pass of several variants: all rows of the first, all rows of the second, ..."""
        text, size = self.model.text, len(self.base.prompt)
        row = torch.arange(size, device=self.base.embedded.device).repeat(len(swapped))
        mixed = _MixedRows(self, swapped.repeat_interleave(size, 0).to(row.device), row, start)
        x, layout = self.base.streams[start][row], self.base.layout.selected(row)
        rotation = text.rotary_emb(layout.positions)
        # Contributions last: they see the experts' output when it has its own shape again.
        with branched(text, mixed.change), contributions(text, mixed.note), listening(self.model, mixed.routes()):
            for layer in text.layers[start:]:
                x = layer(x, rotation, layout)
            return wide(values_of(self.model, self.base, x, row)).unflatten(0, (len(swapped), size))


@dataclass(frozen=True, eq=False)
class _MixedRows:
    """The rows of one pass.

    Attributes:
        mixing: What they belong to.
        swapped: For each row its swapped edges.
        row: The row of the base prompt of each.
        start: The layer in which the pass begins; before it all is as in the base run.
        differences: Stage -> source less this pass, for each of its senders.
    """

    mixing: Mixing
    swapped: Bool[Tensor, "n sender receiver"]
    row: Int[Tensor, " n"]
    start: int
    differences: dict[int, Tensor] = field(default_factory=dict)

    def note(self, stage: int, written: Float[Tensor, "n seq sender d_model"]) -> None:
        """Keeps how far the senders of a stage are from the source run."""
        source = self.mixing.source.written[stage].to(written.device)
        self.differences[stage] = wide(source)[self.row] - wide(written)

    def _difference(self, stage: int) -> Float[Tensor, "n seq sender d_model"]:
        if stage >= 2 * self.start:
            return self.differences[stage]
        base, source = (run.written[stage] for run in (self.mixing.base, self.mixing.source))
        return (wide(source).to(base.device) - wide(base))[self.row]

    def change(self, reading: Reading) -> Change | None:
        """What receivers read instead of the stream of this pass."""
        graph = self.mixing.graph
        place = graph.block("receiver", reading.stage, reading.part)
        swapped = self.swapped[:, :, place]
        used = swapped.any(0).any(0).nonzero().flatten().tolist()
        if not used:
            return None
        if reading.indices is None:
            pattern, mixed = swapped[..., used], "n u r, n s u d -> n s r d"
        else:
            # For each slot the edges into its own expert.
            own = reading.indices.flatten(1)[:, None].expand(-1, swapped.shape[1], -1)
            pattern = swapped.gather(2, own).unflatten(-1, reading.indices.shape[1:])
            mixed = "n u s r, n s u d -> n s r d"
        total = torch.zeros((), device=reading.stream.device)
        for stage in range(-1, reading.stage):
            senders = graph.block("sender", stage)
            part = pattern[:, senders]
            if bool(part.any()):
                difference = self._difference(stage).to(reading.stream.device)
                total = total + torch.einsum(mixed.replace(" ", ""), part.to(difference), difference)
        return Change(used, total)

    def routes(self) -> dict:
        """Listeners that hold the routers to the base run, where that is asked for."""
        if not self.mixing.frozen_routing:
            return {}

        def holder(recorded: Tensor):
            return lambda now: recorded[self.row].to(now.device)

        return {name: holder(tensor) for name, tensor in self.mixing.base.routes.items()}
