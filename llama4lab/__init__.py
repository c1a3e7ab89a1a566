"""llama4lab: see, change and measure everything inside Llama 4.

The road of the data is the order of the folders: checkpoint -> model -> prompt -> run -> tables -> viz -> widgets.
"""

from llama4lab import tables as tables
from llama4lab import viz as viz
from llama4lab import widgets as widgets
from llama4lab.model.llama4 import HookedLlama4 as HookedLlama4
from llama4lab.model.llama4 import HookedLlama4ForCausalLM as HookedLlama4ForCausalLM
from llama4lab.model.loading import load as load
from llama4lab.prompt.prompt import Prompt as Prompt
from llama4lab.prompt.repeats import repeated_tokens as repeated_tokens
from llama4lab.run import ablation as ablation
from llama4lab.run import metrics as metrics
from llama4lab.run.attention.editing import edited as edited
from llama4lab.run.attention.reductions import Wanted as Wanted
from llama4lab.run.attention.streaming import AttentionStream as AttentionStream
from llama4lab.run.attention.streaming import attention_stream as attention_stream
from llama4lab.run.attribution import attribute as attribute
from llama4lab.run.attribution_result import Attribution as Attribution
from llama4lab.run.cell_patching import cell_patches as cell_patches
from llama4lab.run.circuit import Circuit as Circuit
from llama4lab.run.circuit_evaluation import faithfulness as faithfulness
from llama4lab.run.corpus.counting import routing_stats as routing_stats
from llama4lab.run.corpus.stats import RoutingStats as RoutingStats
from llama4lab.run.edge_attribution import EdgeAttribution as EdgeAttribution
from llama4lab.run.edges import attribute_edges as attribute_edges
from llama4lab.run.generation import generate as generate
from llama4lab.run.pairing import matching_positions as matching_positions
from llama4lab.run.patching import patched as patched
from llama4lab.run.paths import PathEffects as PathEffects
from llama4lab.run.paths import patch_paths as patch_paths
from llama4lab.run.recording import record as record
from llama4lab.run.routes.content import route_and_content as route_and_content
from llama4lab.run.routes.freeze import frozen_routing as frozen_routing
from llama4lab.run.routes.rerouting import rerouted as rerouted
from llama4lab.run.routes.routed_experts import RoutedExperts as RoutedExperts
from llama4lab.run.run import Run as Run
from llama4lab.run.size import recorded_nbytes as recorded_nbytes
from llama4lab.run.steering import steered as steered
from llama4lab.run.steering_vectors import SteeringVector as SteeringVector
from llama4lab.run.steering_vectors import steering_vector as steering_vector
from llama4lab.run.sweep_result import Sweep as Sweep
from llama4lab.run.sweeping import sweep as sweep
from llama4lab.run.tracing import nnsight as nnsight
from llama4lab.run.tuned_lens import TunedLens as TunedLens
from llama4lab.run.vision.boxes import image_region as image_region
from llama4lab.run.vision.regions import ImageRegion as ImageRegion
from llama4lab.tables.memory_plan import MemoryPlan as MemoryPlan
from llama4lab.tables.planning import memory_plan as memory_plan
from llama4lab.tables.verification.report import Verification as Verification
from llama4lab.tables.verifying import verify as verify

# `Sweep` stands left of the plots, so its own plot is handed to it here.
Sweep.plotter = staticmethod(viz.patching.effects)

__version__ = "0.1.0"
