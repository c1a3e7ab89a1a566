"""Choose, look, click: interactive views, by the nouns of `llama4lab.viz`.

A widget's choices are traits, so what the mouse can do, code can do too. Each has its static twin in `viz` as `.ax`,
and shows that picture in a saved notebook that no kernel runs.
"""

from llama4lab.widgets import attention, bars, generation, grid, logits, patching, routing, tokens, vision

__all__ = ["attention", "bars", "generation", "grid", "logits", "patching", "routing", "tokens", "vision"]
