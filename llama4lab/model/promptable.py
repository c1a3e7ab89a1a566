"""How a model gets its `prompt` method although prompts are made by a folder further right."""

from functools import cached_property
from typing import Any, ClassVar


class Promptable:
    """Lets `model.prompt(...)` turn text, chats and images into a `Prompt`.

    Attributes:
        make_prompter: Gives the prompter of a model. The folder `prompt` stands to the right of `model` and registers
            its own here when llama4lab is imported.
    """

    make_prompter: ClassVar[Any] = None

    @cached_property
    def prompter(self) -> Any:
        """The prompter of this checkpoint: its tokenizer, chat template and image processor."""
        if self.make_prompter is None:
            raise RuntimeError("No prompter is registered. Write `import llama4lab` before using model.prompt.")
        return self.make_prompter(self)

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer; None for a model that takes token ids only."""
        return self.prompter.tokenizer

    def prompt(self, content: Any, **options: Any) -> Any:
        """Gives the `Prompt` for a text, a chat, several of either, or token ids; see `llama4lab.prompt.Prompter`."""
        return self.prompter(content, **options)
