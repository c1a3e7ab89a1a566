"""Views of pictures to point at: the nouns of `llama4lab.viz.vision`."""

from llama4lab.widgets.vision.attention_view import ImageAttention as ImageAttention
from llama4lab.widgets.vision.patch_view import Patches as Patches
