"""The hook points of the residual stream, and which of them are the same place."""

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.hook_names import layer_of
from llama4lab.run.run import Run
from llama4lab.run.selection import Selector, selected

KINDS = ("resid_pre", "resid_mid", "resid_post")
RESIDUAL = ("embed", "embed_merged", "layers.*.resid_pre", "layers.*.resid_mid", "layers.*.resid_post", "final_norm")
LAST = "final_norm"


def kind_of(name: str) -> str | None:
    """What a hook point is in the residual stream: "embed", "resid_pre", "resid_mid", ...; None if it is elsewhere."""
    first, _, rest = name.partition(".")
    if first == "layers":
        kind = rest.partition(".")[2]
        return kind if kind in KINDS else None
    return name if name in ("embed", "embed_merged", LAST) else None


def place_of(name: str, num_layers: int) -> str:
    """One name for hook points that see the same vectors: where a layer ends, the next one begins.

    The embeddings are one place, too, and so are the last layer's end and the final norm, from which only the output
    matrix is left.
    """
    kind, layer = kind_of(name), layer_of(name)
    if kind == "resid_pre" and layer is not None:
        return place_of(f"layers.{layer - 1}.resid_post", num_layers) if layer else "embed_merged"
    if kind == "embed":
        return "embed_merged"
    return LAST if name == f"layers.{num_layers - 1}.resid_post" else name


def recorded_residuals(model: HookedPreTrainedModel, run: Run, at: Selector | None = None) -> list[str]:
    """The hook points of the residual stream that a run has, in the order of the forward pass.

    Args:
        model: The model.
        run: The run.
        at: Which of them, as names or globs; all by default.

    Raises:
        KeyError: if what is asked for was not recorded.
        ValueError: if a hook point is asked for that is not in the residual stream.
    """
    points, found = model.hook_points(), set()
    for pattern in RESIDUAL if at is None else [at] if isinstance(at, str) else at:
        names = selected(points, pattern)
        outside = [name for name in names if kind_of(name) is None]
        if outside:
            raise ValueError(
                f"{outside[0]} is not in the residual stream, which alone can be read by a lens.\n"
                f"Hook points of the residual stream: {', '.join(RESIDUAL)}."
            )
        own = [name for name in names if name in run]
        if not own and at is not None:
            raise KeyError(f"{pattern!r} was not recorded. Record it with at={pattern!r}.")
        found.update(own)
    if not found:
        raise KeyError(
            'The run has no hook point of the residual stream. Record some with at="layers.*.resid_post", '
            "or all with at=lab.tables.logit_lens.RESIDUAL."
        )
    return [name for name in points if name in found]
