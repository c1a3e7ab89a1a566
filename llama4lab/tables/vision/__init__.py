"""Everything about images: where each token lies in the picture, and what the model made of it."""

from llama4lab.tables.vision.image_tokens import tokens as tokens
