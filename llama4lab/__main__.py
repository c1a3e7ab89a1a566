"""`python -m llama4lab` is the command `llama4lab`."""

from llama4lab.cli import app

app()
