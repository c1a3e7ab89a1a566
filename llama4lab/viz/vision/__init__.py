"""Plots of `llama4lab.tables.vision`."""

from llama4lab.viz.vision.causes import occlusion as occlusion
from llama4lab.viz.vision.causes import region_effects as region_effects
from llama4lab.viz.vision.causes import side_by_side as side_by_side
from llama4lab.viz.vision.causes import sweep_places as sweep_places
from llama4lab.viz.vision.feature_maps import norms as norms
from llama4lab.viz.vision.feature_maps import pca as pca
from llama4lab.viz.vision.feature_maps import segments as segments
from llama4lab.viz.vision.feature_maps import similarity as similarity
from llama4lab.viz.vision.layer_maps import cka as cka
from llama4lab.viz.vision.modality import experts as experts
from llama4lab.viz.vision.modality import modality_information as modality_information
from llama4lab.viz.vision.modality import modality_shares as modality_shares
from llama4lab.viz.vision.overlays import overlay as overlay
from llama4lab.viz.vision.overlays import tokens as tokens
from llama4lab.viz.vision.roads import layout as layout
from llama4lab.viz.vision.weights import attention as attention
from llama4lab.viz.vision.weights import rollout as rollout
from llama4lab.viz.vision.weights import vision_attention as vision_attention
from llama4lab.viz.vision.words import lens as lens
from llama4lab.viz.vision.words import word_map as word_map
