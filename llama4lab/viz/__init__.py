"""DataFrame -> matplotlib Axes, by the nouns of `llama4lab.tables`.

Every function draws into `ax`, or into a figure of its own, and gives the Axes back. None shows, saves or changes any
global setting.
"""

from llama4lab.viz import (
    attention,
    circuits,
    generation,
    heads,
    logit_attribution,
    logit_lens,
    logits,
    patching,
    route_content,
    routing,
    verification,
    vision,
)

__all__ = [
    "attention",
    "circuits",
    "generation",
    "heads",
    "logit_attribution",
    "logit_lens",
    "logits",
    "patching",
    "route_content",
    "routing",
    "verification",
    "vision",
]
