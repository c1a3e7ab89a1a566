"""The command line. Every command is one call of the library."""

from pathlib import Path
from typing import Annotated

import typer

from llama4lab.checkpoint.locating import locate
from llama4lab.checkpoint.summary import summarize
from llama4lab.model.loading import empty_model, opened
from llama4lab.tables.planning import holds_weights, memory_plan
from llama4lab.tour import tour as write_tour

app = typer.Typer(no_args_is_help=True, add_completion=False, help="See, change and measure everything inside Llama 4.")
Checkpoint = Annotated[str, typer.Argument(help='"tiny", a folder, a GGUF file, or an id on the Hugging Face hub')]


@app.command()
def tour(
    checkpoint: Checkpoint = "tiny",
    out: Annotated[Path, typer.Option(help="folder for index.html and the figures")] = Path("tour"),
) -> None:
    """Record, patch and re-route a text and an image prompt; print what was found and write a page about it."""
    write_tour(checkpoint, out)


@app.command()
def info(
    checkpoint: Checkpoint,
    memory: Annotated[list[str] | None, typer.Option(help="of a device, such as cuda:0=80GiB; again for more")] = None,
    bandwidth: Annotated[list[str] | None, typer.Option(help="disk=7GB/s, or cpu=25GB/s (RAM to a GPU)")] = None,
    quantize: Annotated[str | None, typer.Option(help="int8, int4 or fp8, on the way")] = None,
) -> None:
    """Say what is in a checkpoint, from its headers alone, and how it would be loaded into the memory there is."""
    folder = locate(checkpoint)
    if holds_weights(folder):
        model = empty_model(folder)
        typer.echo(f"{summarize(model.config, opened(folder, model))}\n")
    try:
        plan = memory_plan(folder, memory=_pairs(memory), quantize=quantize, bandwidths=_pairs(bandwidth))
    except (ValueError, MemoryError) as error:
        typer.echo(f"No plan: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(plan)


@app.command()
def hooks(checkpoint: Checkpoint) -> None:
    """List the hook points of a checkpoint with their shapes."""
    typer.echo(repr(empty_model(locate(checkpoint)).hook_points()))


def _pairs(given: list[str] | None) -> dict[str, str] | None:
    """Gives "name=value" texts as a dict; None for none."""
    if not given:
        return None
    for text in given:
        if "=" not in text:
            raise typer.BadParameter(f"{text!r} is not of the form name=value, such as cuda:0=80GiB or disk=7GB/s.")
    return {name: value for name, _, value in (text.partition("=") for text in given)}
