"""The command line. Every command is one call of the library."""

from pathlib import Path
from typing import Annotated

import typer

from llama4lab.checkpoint.locating import locate
from llama4lab.checkpoint.summary import summarize
from llama4lab.model.loading import empty_model, opened
from llama4lab.tour import tour as write_tour

app = typer.Typer(no_args_is_help=True, add_completion=False, help="See, change and measure everything inside Llama 4.")
Checkpoint = Annotated[str, typer.Argument(help='"tiny", a folder, or an id on the Hugging Face hub')]


@app.command()
def tour(
    checkpoint: Checkpoint = "tiny",
    out: Annotated[Path, typer.Option(help="folder for index.html and the figures")] = Path("tour"),
) -> None:
    """Record, patch and re-route a text and an image prompt; print what was found and write a page about it."""
    write_tour(checkpoint, out)


@app.command()
def info(checkpoint: Checkpoint) -> None:
    """Say what is in a checkpoint, from its headers alone."""
    folder = locate(checkpoint)
    model = empty_model(folder)
    typer.echo(summarize(model.config, opened(folder, model)))


@app.command()
def hooks(checkpoint: Checkpoint) -> None:
    """List the hook points of a checkpoint with their shapes."""
    typer.echo(repr(empty_model(locate(checkpoint)).hook_points()))
