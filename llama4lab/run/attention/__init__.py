"""Attention, changed and measured."""
