"""How a corpus is cut into passes.

As a rule: into batches of rows of like length. Where weights wait on disk, each pass reads them once, however many
tokens it has; so there as many rows as memory holds go through the layers together, as the documents of one long row.
"""

from dataclasses import dataclass

from llama4lab.model.config_parts import text_part
from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.model.working_memory import activation_room
from llama4lab.run.corpus.batches import Batch, batch_of, bucketed, packed_batch, packed_rows
from llama4lab.run.corpus.items import Row
from llama4lab.run.listening import is_hooked
from llama4lab.run.size import free_nbytes

TOKENS = 4096  # of a batch, by default
MOST_TOKENS = 32768  # of a packed pass, by default; from here on computing takes longer than reading


@dataclass(frozen=True)
class Passes:
    """The way in which rows are put into passes.

    Attributes:
        tokens: The most tokens of a pass, padding included.
        packed: Whether all rows of a pass are documents of one row.
    """

    tokens: int
    packed: bool

    @property
    def about(self) -> int | str:
        """What tells it from another way."""
        return f"{self.tokens}, packed" if self.packed else self.tokens

    def cut(self, window: list[list[Row]]) -> list[list[Row]]:
        """Cuts the rows of some items into passes."""
        return packed_rows(window, self.tokens) if self.packed else bucketed(window, self.tokens)

    def batch(self, rows: list[Row], filler: int) -> Batch:
        """Gives the input of a pass."""
        return packed_batch(rows) if self.packed else batch_of(rows, filler)


def passes_of(model: HookedPreTrainedModel, tokens: int | None, about: int | str | None = None) -> Passes:
    """Gives the way in which a corpus is put through a model.

    Rows are packed only where nobody can see it: functions at hook points and edits of attention expect the rows of a
    batch, and kernels that need a mask would need one of all tokens by all tokens.

    Args:
        model: The model.
        tokens: The most tokens of a pass; None for what is usual, or fits.
        about: Of the passes of a count that is to go on.
    """
    packed = model.store is not None and model.attn == "auto" and not is_hooked(model) and not model.text.edits
    if not packed or tokens is not None:
        return Passes(TOKENS if tokens is None else tokens, packed)
    if isinstance(about, str):
        return Passes(int(about.partition(",")[0]), packed)
    return Passes(_fitting(model), packed)


def _fitting(model: HookedPreTrainedModel) -> int:
    """The largest power of two that half of the free memory holds, within bounds."""
    config, free = text_part(model.config), free_nbytes(model.device)
    if model.store is not None and model.device in model.store.tiers:
        tier = model.store.tiers[model.device]
        free -= tier.budget - tier.nbytes  # will be filled
    each = activation_room(config, 1, model.dtype, model.device.type).nbytes
    routers = len(facts(model.config)["moe_layers"])
    each += routers * (8 * config.num_local_experts + 32 * config.num_experts_per_tok)  # what is kept to be counted
    fits = max(free // 2 // each, 1)
    return min(max(1 << (fits.bit_length() - 1), TOKENS), MOST_TOKENS)
