"""Plots of `llama4lab.tables.routing`."""

from llama4lab.viz.routing.choices import decisions as decisions
from llama4lab.viz.routing.loads import expert_load as expert_load
