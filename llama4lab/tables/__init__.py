"""Run -> tidy pandas DataFrame: one row for each thing that was observed, one column for each thing known about it."""

from llama4lab.tables import attention, logits, routing, vision

__all__ = ["attention", "logits", "routing", "vision"]
