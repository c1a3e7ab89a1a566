"""What a checkpoint is made of, from its config and the headers of its files. No weight is read."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from transformers import Llama4Config, Llama4TextConfig

from llama4lab.checkpoint.layouts import Layout
from llama4lab.checkpoint.weights import Weights

# The part of the model a tensor belongs to; the first pattern found in its name counts.
COMPONENTS = {
    "vision": r"^vision_model\.",
    "projector": r"^multi_modal_projector\.",
    "embeddings": r"\bembed_tokens\.",
    "lm_head": r"\blm_head\.",
    "attention": r"\.self_attn\.",
    "router": r"\.feed_forward\.router\.",
    "shared expert": r"\.feed_forward\.shared_expert\.",
    "routed experts": r"\.feed_forward\.experts\.",
    "dense MLP": r"\.feed_forward\.(gate|up|down)_proj\.",
    "norms": r"norm\.weight$",
    "other": "",
}


@dataclass(frozen=True)
class Summary:
    """The parts of a checkpoint. Shows itself as a small table.

    Args:
        folder: Where it is.
        layout: How the tensors are named.
        parameters: How many numbers each component has.
        nbytes: How many bytes each component takes on disk.
        dtypes: How many tensors are stored in each dtype.
        schemes: How many matrices are quantized in each way.
        layers: The kind of each text layer, such as `"RoPE, MoE"` or `"NoPE, dense"`.
        files: How many files hold the weights.
    """

    folder: Path
    layout: Layout
    parameters: dict[str, int]
    nbytes: dict[str, int]
    dtypes: dict[str, int]
    schemes: dict[str, int]
    layers: list[str]
    files: int

    def __str__(self) -> str:
        rows = [(name, self.parameters[name], self.nbytes[name]) for name in self.parameters]
        rows.append(("total", sum(self.parameters.values()), sum(self.nbytes.values())))
        kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(self.layers).items())
        dtypes = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in self.dtypes.items())
        schemes = "; ".join(f"{name} ({count} matrices)" for name, count in self.schemes.items())
        return "\n".join(
            [
                f"{self.folder}: {self.layout}, in {self.files} file{'s' if self.files > 1 else ''}",
                f"layers: {kinds}",
                f"stored as {dtypes}",
                *([f"quantized as {schemes}"] if schemes else []),
                f"{'component':<16}{'parameters':>18}{'bytes':>20}",
                *(f"{name:<16}{parameters:>18,}{nbytes:>20,}" for name, parameters, nbytes in rows),
            ]
        )


def summarize(config: Llama4Config | Llama4TextConfig, weights: Weights) -> Summary:
    """Gives the summary of a checkpoint.

    Args:
        config: Its config.
        weights: Its weights, opened for the model of the config.
    """
    shards = weights.shards
    parameters: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for name, count in weights.counts().items():
        parameters[_component(name)] += count
    for name in shards:
        spec = shards.spec(name)
        nbytes[_component(name)] += spec.nbytes
        dtypes[str(spec.dtype).removeprefix("torch.")] += 1
    present = [part for part in COMPONENTS if part in nbytes]
    return Summary(
        folder=shards.folder,
        layout=weights.layout,
        parameters={part: parameters[part] for part in present},
        nbytes={part: nbytes[part] for part in present},
        dtypes=dict(dtypes.most_common()),
        schemes=weights.schemes(),
        layers=_layer_kinds(config),
        files=len({shards.file(name) for name in shards}),
    )


def _component(name: str) -> str:
    return next(part for part, pattern in COMPONENTS.items() if re.search(pattern, name))


def _layer_kinds(config: Llama4Config | Llama4TextConfig) -> list[str]:
    text = config.text_config if isinstance(config, Llama4Config) else config
    assert isinstance(text, Llama4TextConfig)
    moe_layers, ropes = text.moe_layers or [], text.no_rope_layers or []
    # In the config a 1 means that the layer uses RoPE, although the list is called no_rope_layers.
    return [
        f"{'RoPE' if rope else 'NoPE'}, {'MoE' if layer in moe_layers else 'dense'}" for layer, rope in enumerate(ropes)
    ]
