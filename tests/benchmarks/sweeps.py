"""Activation patching against the loops one writes with other tools: same weights, same cells, one process, in turn.

    python tests/benchmarks/sweeps.py                       both tables with everything installed, about ten minutes
    python tests/benchmarks/sweeps.py heads                 one of: positions heads
    python tests/benchmarks/sweeps.py positions --rounds 7 --against transformers transformer-lens

The peers are optional: `pip install transformer-lens==4.3.0 nnsight==0.8.1`. Nothing is downloaded.

Table `positions` patches the residual stream before each layer at each of 32 positions, table `heads` each attention
head at all positions. Every way starts from the two prompts, so that the clean pass is in its time, and gives the logit
difference at the last position; all have to agree. Times are CPU seconds of one thread, as median (lowest - highest) of
the rounds; the machine may be busy, so read the ratios. Weights are random normal: hidden size 256, 8 layers, 8 heads,
16 experts, top-1, float32.
"""

import argparse
import contextlib
import copy
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import Llama4ForCausalLM, Llama4TextConfig, PreTrainedTokenizerFast

import llama4lab as lab
from llama4lab.model.llama4 import HookedLlama4ForCausalLM

LAYERS, LENGTH, HEADS, D_HEAD, VOCAB, RIGHT, WRONG = 8, 32, 8, 32, 1024, 17, 401
INVOKES = 32  # of nnsight in one trace


@dataclass(frozen=True)
class Table:
    """What a table patches, in the words of every tool.

    Attributes:
        axis: The second axis; the first is the layer.
        at: llama4lab's hook point.
        module: Of a layer of transformers' model, the module whose input is patched; "" for the layer.
        index: Number on the axis -> index into that input.
        lens: The function of transformer_lens.patching.
    """

    axis: str
    at: str
    module: str
    index: Callable[[int], Any]
    lens: str

    def count(self, prompt: Tensor) -> int:
        """The length of the second axis."""
        return prompt.shape[1] if self.axis == "position" else HEADS


TABLES = {
    "positions": Table(
        *("position", "layers.*.resid_pre", "", lambda place: (slice(None), place), "get_act_patch_resid_pre")
    ),
    "heads": Table(
        *("head", "layers.*.self_attn.z", "self_attn.o_proj"),
        lambda head: (..., slice(D_HEAD * head, D_HEAD * (head + 1))),
        "get_act_patch_attn_head_out_all_pos",
    ),
}


def new_model() -> Llama4ForCausalLM:
    torch.manual_seed(0)
    return Llama4ForCausalLM(
        Llama4TextConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            head_dim=D_HEAD,
            num_local_experts=16,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            attention_chunk_size=8192,
            initializer_range=256**-0.5,  # keeps the size of activations, so that every cell has an effect
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            pad_token_id=0,
        )
    ).eval()


def score(logits: Tensor) -> Tensor:
    return logits[0, -1, RIGHT] - logits[0, -1, WRONG]


def patched_at(layers: Any, table: Table, layer: int) -> Any:
    """The module whose input is patched: a module of transformers, or what nnsight wraps around it."""
    return attrgetter(table.module)(layers[layer]) if table.module else layers[layer]


class WithLlama4Lab:
    def __init__(self, theirs: Llama4ForCausalLM):
        with torch.device("meta"):
            self.model = HookedLlama4ForCausalLM(copy.deepcopy(theirs.config)).eval()
        self.model.load_state_dict(theirs.state_dict(), assign=True)

    def __call__(self, table: Table, clean: Tensor, corrupted: Tensor) -> Tensor:
        metric = lab.metrics.logit_diff(RIGHT, WRONG)
        result = lab.sweep(
            self.model, clean, corrupted, at=table.at, over=["layer", table.axis], metric=metric, progress=False
        )
        return result.tensor("patched")


class WithTransformers:
    """A forward pre-hook and a pass for each cell."""

    def __init__(self, theirs: Llama4ForCausalLM):
        self.model = theirs

    def __call__(self, table: Table, clean: Tensor, corrupted: Tensor) -> Tensor:
        modules = [patched_at(self.model.model.layers, table, layer) for layer in range(LAYERS)]
        sources: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, args: tuple) -> None:
            sources[module] = args[0]

        def patch(index: Any, module: nn.Module, args: tuple) -> tuple:
            x = args[0].clone()
            x[index] = sources[module][index]
            return (x, *args[1:])

        handles = [module.register_forward_pre_hook(keep) for module in modules]
        self.model(clean, use_cache=False)
        for handle in handles:
            handle.remove()
        values = torch.empty(LAYERS, table.count(corrupted))
        for layer, module in enumerate(modules):
            for i in range(table.count(corrupted)):
                handle = module.register_forward_pre_hook(partial(patch, table.index(i)))
                values[layer, i] = score(self.model(corrupted, use_cache=False).logits)
                handle.remove()
        return values


class WithNnsight:
    """A trace for each cell, or for 32 cells as batched invokes."""

    def __init__(self, theirs: Llama4ForCausalLM, invokes: int):
        # A model's invokes are batched by its tokenizer; these are token ids, of which it only reads how to pad.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"a": 0})), pad_token="a", padding_side="left"
        )
        kind = import_module("nnsight.modeling.transformers").TransformersModel
        self.model = kind(copy.deepcopy(theirs), task="text-generation", tokenizer=tokenizer)
        self.invokes = invokes

    def __call__(self, table: Table, clean: Tensor, corrupted: Tensor) -> Tensor:
        model = self.model
        modules = [patched_at(model.model.layers, table, layer) for layer in range(LAYERS)]
        sources: list[Tensor] = []
        with model.trace(clean, use_cache=False):
            for module in modules:
                sources.append(module.input)  # noqa: PERF401, nnsight reads this block line by line
        cells = [(layer, i) for layer in range(LAYERS) for i in range(table.count(corrupted))]
        values = torch.empty(LAYERS, table.count(corrupted))
        for start in range(0, len(cells), self.invokes):
            with model.trace(use_cache=False) as tracer:
                for layer, i in cells[start : start + self.invokes]:
                    with tracer.invoke(corrupted):
                        modules[layer].input[table.index(i)] = sources[layer][table.index(i)]
                        values[layer, i] = score(model.lm_head.output)
        return values


class WithTransformerLens:
    """The function of its library: a pass for each cell."""

    def __init__(self, theirs: Llama4ForCausalLM):
        build = import_module("transformer_lens.model_bridge.sources._bridge_builder").build_bridge_from_module
        self.model = build(copy.deepcopy(theirs), "Llama4ForCausalLM", hf_config=theirs.config)
        self.patching = import_module("transformer_lens.patching")

    def __call__(self, table: Table, clean: Tensor, corrupted: Tensor) -> Tensor:
        _, cache = self.model.run_with_cache(clean)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            return getattr(self.patching, table.lens)(self.model, corrupted, cache, score)


WAYS: dict[str, tuple[str, Callable[[Llama4ForCausalLM], Any]]] = {
    "llama4lab": ("llama4lab", WithLlama4Lab),
    "transformers": ("transformers", WithTransformers),
    "nnsight": ("nnsight", partial(WithNnsight, invokes=1)),
    "nnsight-batched": ("nnsight", partial(WithNnsight, invokes=INVOKES)),
    "transformer-lens": ("transformer_lens", WithTransformerLens),
}


def measured(ways: dict[str, Any], table: Table, rounds: int) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """CPU seconds of each way, round by round, and what it found."""
    torch.manual_seed(1)
    clean = torch.randint(VOCAB, (1, LENGTH))
    corrupted = (clean + torch.randint(1, VOCAB, clean.shape)) % VOCAB  # another token at every position
    for way in ways.values():
        way(TABLES["positions"], clean[:, :2], corrupted[:, :2])  # so that everything has run once
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, Tensor] = {}
    for name in list(ways) * rounds:
        start = time.process_time()
        values[name] = ways[name](table, clean, corrupted)
        seconds[name].append(time.process_time() - start)
    return seconds, values


def show(seconds: dict[str, list[float]], values: dict[str, Tensor], table: Table) -> None:
    layers, count = values["llama4lab"].shape
    print(f"\n{layers} layers x {count} {table.axis}s, {table.at}: {layers * count} cells")
    print(f"{'':<18} {'CPU seconds':>26} {'ratio':>22} {'largest difference':>20}")
    ours = seconds["llama4lab"]
    for name, theirs in seconds.items():
        difference = (values[name] - values["llama4lab"]).abs().max().item()
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        print(f"{name:<18} {spread(theirs):>26} {spread(ratios):>22} {difference:>20.1e}", flush=True)
        assert difference < 1e-5


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tables", nargs="*", help=f"of {' '.join(TABLES)}; both by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", nargs="*", default=[*WAYS][1:], choices=[*WAYS][1:])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    theirs, ways = new_model(), {}
    for name in ("llama4lab", *asked.against):
        package, way = WAYS[name]
        if find_spec(package) is None:
            print(f"{name}: left out, {package} is not installed")
        else:
            ways[name] = way(theirs)
    for name in asked.tables or TABLES:
        show(*measured(ways, TABLES[name], asked.rounds), TABLES[name])


if __name__ == "__main__":
    main()
