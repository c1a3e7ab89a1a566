"""Everything about experts: choices, loads, flow between layers, what experts write, and what they are for."""

from llama4lab.tables.routing.choices import decisions as decisions
from llama4lab.tables.routing.loads import expert_load as expert_load
