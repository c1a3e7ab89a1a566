"""Run -> tidy pandas DataFrame: one row for each thing that was observed, one column for each thing known about it."""

from llama4lab.tables import (
    attention,
    attribution,
    circuits,
    generation,
    heads,
    logit_attribution,
    logit_lens,
    logits,
    routing,
    vision,
)

__all__ = [
    "attention",
    "attribution",
    "circuits",
    "generation",
    "heads",
    "logit_attribution",
    "logit_lens",
    "logits",
    "routing",
    "vision",
]
