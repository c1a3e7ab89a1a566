"""Counting what routers do with a corpus."""
