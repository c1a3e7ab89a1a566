"""llama4lab: see, change and measure everything inside Llama 4.

The road of the data is the order of the folders: checkpoint -> model -> prompt -> run -> tables -> viz.
"""

from llama4lab import tables as tables
from llama4lab import viz as viz
from llama4lab.model.llama4 import HookedLlama4 as HookedLlama4
from llama4lab.model.llama4 import HookedLlama4ForCausalLM as HookedLlama4ForCausalLM
from llama4lab.model.loading import load as load
from llama4lab.prompt.prompt import Prompt as Prompt
from llama4lab.run import metrics as metrics
from llama4lab.run.cell_patching import cell_patches as cell_patches
from llama4lab.run.generation import generate as generate
from llama4lab.run.pairing import matching_positions as matching_positions
from llama4lab.run.patching import patched as patched
from llama4lab.run.recording import record as record
from llama4lab.run.run import Run as Run
from llama4lab.run.size import recorded_nbytes as recorded_nbytes
from llama4lab.run.sweep_result import Sweep as Sweep
from llama4lab.run.sweeping import sweep as sweep
from llama4lab.run.tracing import nnsight as nnsight

__version__ = "0.1.0"
