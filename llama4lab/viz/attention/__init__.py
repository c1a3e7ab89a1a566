"""Plots of `llama4lab.tables.attention`."""

from llama4lab.viz.attention.anatomy import angles as angles
from llama4lab.viz.attention.anatomy import score_bands as score_bands
from llama4lab.viz.attention.anatomy import score_split as score_split
from llama4lab.viz.attention.chunk_maps import chunk_map as chunk_map
from llama4lab.viz.attention.distances import mass_at_distance as mass_at_distance
from llama4lab.viz.attention.head_circuits import copying as copying
from llama4lab.viz.attention.head_circuits import ov as ov
from llama4lab.viz.attention.head_circuits import qk as qk
from llama4lab.viz.attention.horizons import horizon as horizon
from llama4lab.viz.attention.patterns import mass as mass
from llama4lab.viz.attention.patterns import pattern as pattern
from llama4lab.viz.attention.probes import needle as needle
from llama4lab.viz.attention.temperatures import temperature as temperature
