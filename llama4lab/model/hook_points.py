"""The catalogue of a model's hook points: every name, its shape in words, and the module behind it."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from html import escape

from torch import nn

from llama4lab.model.hook_point import HookPoint

# Dropped from the start of a module path, the first that matches. What a checkpoint calls
# `language_model.model.layers.3.self_attn.q` or `model.layers.3.self_attn.q` is `layers.3.self_attn.q` here.
PREFIXES = {"language_model.model.": "", "language_model.": "", "model.": "", "vision_model.model.": "vision_model."}


class HookPoints(Mapping[str, str]):
    """Names of hook points in the order of the forward pass -> shape in words. Shows itself as a table."""

    def __init__(self, modules: dict[str, HookPoint]):
        self._modules = modules

    def __getitem__(self, name: str) -> str:
        return self.module(name).shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def module(self, name: str) -> HookPoint:
        """The module of a hook point.

        Raises:
            KeyError: if there is no such hook point; the message has the nearest names.
        """
        if name not in self._modules:
            near = get_close_matches(name, self._modules, n=4, cutoff=0.5)
            raise KeyError(
                f"{name!r} is not a hook point. Near names: {', '.join(near) or 'none'}; all: model.hook_points()."
            )
        return self._modules[name]

    def _families(self) -> list[tuple[str, str, str]]:
        """Name, shape and a note for each family of names that differ only in the layer."""
        families: dict[tuple[str, str, bool], list[str]] = {}
        for name in sorted(self, key=lambda name: _place(name)[::2]):
            point = self._modules[name]
            head, found, rest = name.partition("layers.")
            layer, _, tail = rest.partition(".")
            family = f"{head}layers.{{i}}.{tail}" if found else name
            families.setdefault((family, point.shape, point.lazy), []).append(layer)
        return [
            (family, shape, ("lazy; " if lazy else "") + (f"{len(layers)} layers" if "{i}" in family else ""))
            for (family, shape, lazy), layers in families.items()
        ]

    def __repr__(self) -> str:
        rows = self._families()
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {note}".rstrip() for name, shape, note in rows]
        return "\n".join([f"{len(self)} hook points", *lines])

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td style='text-align:left'><code>{escape(name)}</code></td>"
            f"<td style='text-align:left'>{escape(shape)}</td><td style='text-align:left'>{escape(note)}</td></tr>"
            for name, shape, note in self._families()
        )
        return f"<table><tr><th>{len(self)} hook points</th><th>shape</th><th></th></tr>{cells}</table>"


def hook_points(model: nn.Module) -> HookPoints:
    """Finds every hook point of a model."""
    points = {_short(path): module for path, module in model.named_modules() if isinstance(module, HookPoint)}
    return HookPoints({name: points[name] for name in sorted(points, key=_place)})


def _short(path: str) -> str:
    for prefix, short in PREFIXES.items():
        if path.startswith(prefix):
            return short + path.removeprefix(prefix)
    return path


# The order of the forward pass: of the whole model, and of the parts of a layer.
STAGES = (
    *("vision_model.patch_embed", "vision_model.embed", "vision_model.layers", "vision_model.final_norm"),
    *("vision_model.shuffled", "vision_model.adapter", "image_features", "embed", "embed_merged", "layers"),
    *("final_norm", "logits"),
)
STEPS = (
    *("resid_pre", "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.q_rot", "self_attn.k_rot"),
    *("self_attn.scores", "self_attn.pattern", "self_attn.z", "self_attn.head_out", "self_attn.out", "resid_mid"),
    *("feed_forward.router.logits", "feed_forward.router.indices", "feed_forward.router.gates"),
    *("feed_forward.experts.hidden", "feed_forward.experts.out", "feed_forward.shared_expert.hidden"),
    *("feed_forward.shared_expert.out", "feed_forward.hidden", "mlp.hidden", "feed_forward.out", "mlp.out"),
    "resid_post",
)


def _place(name: str) -> tuple[int, int, int]:
    """Stage, layer and step of a hook point."""
    head, found, rest = name.partition("layers.")
    layer, _, tail = rest.partition(".")
    return STAGES.index(f"{head}layers" if found else name), int(layer or 0), STEPS.index(tail) if found else 0
