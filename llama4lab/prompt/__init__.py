"""Text, chats and images -> token ids, pixel values and the layout of tiles and image tokens."""

from llama4lab.model.promptable import Promptable
from llama4lab.prompt.checkpoint_prompter import prompter_for
from llama4lab.prompt.image_layout import ImageLayout
from llama4lab.prompt.images import ImageProcessor
from llama4lab.prompt.prompt import Prompt
from llama4lab.prompt.prompter import Prompter
from llama4lab.prompt.spans import Span
from llama4lab.prompt.tokenizer import load_tokenizer

# `model` stands to the left and cannot import from here, so model.prompt(...) gets its maker from this line.
Promptable.make_prompter = staticmethod(prompter_for)

__all__ = ["ImageLayout", "ImageProcessor", "Prompt", "Prompter", "Span", "load_tokenizer", "prompter_for"]
