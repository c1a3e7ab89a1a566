"""Views of attention to point at: the nouns of `llama4lab.viz.attention`."""

from llama4lab.widgets.attention.chunk_maps import ChunkMap as ChunkMap
from llama4lab.widgets.attention.distances import Distances as Distances
from llama4lab.widgets.attention.horizons import Horizon as Horizon
from llama4lab.widgets.attention.needles import Needle as Needle
from llama4lab.widgets.attention.patterns import Patterns as Patterns
