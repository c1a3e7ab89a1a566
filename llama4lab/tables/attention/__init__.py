"""Everything about attention: what a token may see, what its heads look at, and how far it reaches."""

from llama4lab.tables.attention.anatomy import angles as angles
from llama4lab.tables.attention.anatomy import score_bands as score_bands
from llama4lab.tables.attention.anatomy import score_bound as score_bound
from llama4lab.tables.attention.anatomy import score_split as score_split
from llama4lab.tables.attention.chunk_maps import chunk_map as chunk_map
from llama4lab.tables.attention.chunk_maps import streamed_chunk_map as streamed_chunk_map
from llama4lab.tables.attention.head_circuits import copying as copying
from llama4lab.tables.attention.head_circuits import ov as ov
from llama4lab.tables.attention.head_circuits import qk as qk
from llama4lab.tables.attention.head_summaries import heads as heads
from llama4lab.tables.attention.head_summaries import value_weighted as value_weighted
from llama4lab.tables.attention.horizons import horizon as horizon
from llama4lab.tables.attention.patterns import chunks as chunks
from llama4lab.tables.attention.patterns import mass as mass
from llama4lab.tables.attention.patterns import pattern as pattern
from llama4lab.tables.attention.probes import needle as needle
from llama4lab.tables.attention.streams import mass_at_distance as mass_at_distance
from llama4lab.tables.attention.streams import reductions as reductions
from llama4lab.tables.attention.streams import top_keys as top_keys
from llama4lab.tables.attention.temperatures import temperature as temperature
