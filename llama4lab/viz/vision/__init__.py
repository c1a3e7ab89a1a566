"""Plots of `llama4lab.tables.vision`."""

from llama4lab.viz.vision.overlay import tokens as tokens
