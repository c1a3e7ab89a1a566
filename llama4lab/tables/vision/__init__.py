"""Everything about images: where each token lies in the picture, and what the model made of it."""

from llama4lab.tables.vision.alignments import cka as cka
from llama4lab.tables.vision.attention_maps import attention as attention
from llama4lab.tables.vision.attention_maps import vision_attention as vision_attention
from llama4lab.tables.vision.components import pca as pca
from llama4lab.tables.vision.embedding_words import nearest_words as nearest_words
from llama4lab.tables.vision.feature_grids import Features as Features
from llama4lab.tables.vision.feature_grids import features as features
from llama4lab.tables.vision.feature_maps import norms as norms
from llama4lab.tables.vision.feature_maps import segments as segments
from llama4lab.tables.vision.feature_maps import similarity as similarity
from llama4lab.tables.vision.image_tokens import tokens as tokens
from llama4lab.tables.vision.lenses import lens as lens
from llama4lab.tables.vision.lenses import word_map as word_map
from llama4lab.tables.vision.modalities import modality_information as modality_information
from llama4lab.tables.vision.modalities import modality_shares as modality_shares
from llama4lab.tables.vision.occlusions import occlusion as occlusion
from llama4lab.tables.vision.patch_effects import sweep_places as sweep_places
from llama4lab.tables.vision.patched_regions import region_effects as region_effects
from llama4lab.tables.vision.places import at_pixel as at_pixel
from llama4lab.tables.vision.places import layout as layout
from llama4lab.tables.vision.places import patch_places as patch_places
from llama4lab.tables.vision.places import token_places as token_places
from llama4lab.tables.vision.pointing_scores import pointing as pointing
from llama4lab.tables.vision.rollouts import rollout as rollout
from llama4lab.tables.vision.routes import experts as experts
