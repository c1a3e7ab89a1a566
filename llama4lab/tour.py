"""The tour: what llama4lab can see and change, on one text prompt and one image prompt.

Each stop is one method: it runs something, and adds what is to be seen to the page.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from llama4lab import tables, viz
from llama4lab.model.config_parts import text_part
from llama4lab.model.layer_kinds import is_chunked, is_moe
from llama4lab.model.loading import load
from llama4lab.page import Page
from llama4lab.run.patching import patched
from llama4lab.run.recording import record
from llama4lab.run.run import Run
from llama4lab.tiny.domains.catalogue import examples
from llama4lab.tiny.drawing import Scene, Thing, picture

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
CHANGED, ANSWER, OTHER = " John", " Mary", " John"  # the token that differs, and the two answers
SCENE = Scene(
    (
        Thing("circle", "red", "top left", 12.0, 12.0, 10.0),
        Thing("square", "blue", "bottom right", 36.0, 36.0, 10.0),
    )
)
QUESTION, COLOUR = "What colour is the circle?", "red"
ROUTER = "layers.*.feed_forward.router.*"


def tour(checkpoint: str = "tiny", out: Path = Path("tour")) -> Path:
    """Takes the tour and gives the path of its page.

    Args:
        checkpoint: What `load` takes.
        out: The folder for `index.html` and the figures.
    """
    guide = Guide(checkpoint, out)
    stops = {
        "load the checkpoint": guide.load,
        "read a text": guide.text,
        "see where tokens are routed": guide.routing,
        "see what crosses chunks": guide.attention,
        "look at an image": guide.image,
        "patch an activation": guide.patch,
        "re-route a token": guide.reroute,
    }
    columns = (TextColumn("{task.description:<30}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=guide.page.console) as progress:
        task = progress.add_task("", total=len(stops))
        for name, stop in stops.items():
            progress.update(task, description=name)
            stop()
            progress.advance(task)
        progress.update(task, description="done")
    path = guide.page.write()
    guide.page.console.print(f"The page: {path}")
    return path


class Guide:
    """Holds the model and the page."""

    def __init__(self, checkpoint: str, out: Path):
        self.checkpoint = checkpoint
        lead = (
            f"What llama4lab sees and changes inside the checkpoint “{checkpoint}”, on one text and one image prompt."
        )
        self.page = Page("A tour of Llama 4", lead, out, Console())

    def load(self) -> None:
        """The model, in figures."""
        self.model = load(self.checkpoint)
        text = text_part(self.model.config)
        experts = f"{text.num_local_experts} experts, {text.num_experts_per_tok} a token, and a shared one"
        kinds = [
            {
                "layer": layer,
                "attention": "RoPE, in its chunk" if is_chunked(text, layer) else "NoPE, whole text",
                "feed-forward": experts if is_moe(text, layer) else "dense MLP",
            }
            for layer in range(text.num_hidden_layers)
        ]
        size = sum(parameter.numel() for parameter in self.model.parameters())
        self.page.section("The model")
        self.page.text(f"{size / 1e6:.1f} million parameters, {len(self.model.hook_points())} hook points.")
        self.page.table("Its layers", pd.DataFrame(kinds), ["layer", "attention", "feed-forward"])

    def text(self) -> None:
        """What the model expects after the text."""
        self.clean = record(self.model, CLEAN, at=[ROUTER, "layers.*.self_attn.pattern", "layers.*.resid_post"])
        self.page.section("A text")
        self.page.text(f"“{CLEAN} …” John gives, so the one who receives is{ANSWER}.")
        self.page.table("Next tokens", tables.logits.top_tokens(self.clean, 5), ["rank", "token", "logit", "prob"])

    def routing(self) -> None:
        """Which expert each token went to, and how loaded the experts are."""
        if not self.clean.meta["moe_layers"]:
            return
        self.page.section("Router decisions and expert loads")
        decisions = tables.routing.decisions(self.clean)
        last = decisions.query("position == position.max()")
        columns = ["layer", "position", "token", "expert", "logit", "gate", "margin", "runner_up"]
        self.page.table("Where the last token was routed", last, columns)
        caption = "The expert of each token in each layer with experts; the lighter, the weaker its gate."
        self.page.figure(viz.routing.decisions(decisions), "router_decisions", caption)
        load = tables.routing.expert_load(decisions)
        most = load.sort_values("expert_load").drop_duplicates("layer", keep="last").sort_values("layer")
        columns = ["layer", "expert", "tokens", "expert_load", "uniform"]
        self.page.table("The most loaded expert of each layer", most, columns)
        self.page.figure(viz.routing.expert_load(load), "expert_load", "The share of tokens that each expert got.")

    def attention(self) -> None:
        """What NoPE layers bring in from other chunks; without that, a far memory is gone."""
        self.page.section("Attention: what crosses chunks")
        size = self.clean.meta["chunk_size"]
        if self.checkpoint != "tiny":
            mass = tables.attention.mass(self.clean)
            self.page.figure(
                viz.attention.mass(mass), "attention_mass", "Attention in the query's chunk and before it."
            )
            return
        far = examples("far_recall", 1)[0]
        run = record(self.model, far.text, at="layers.*.self_attn.pattern")
        length = run.logits.shape[1]
        self.page.text(f"A text of {length} tokens ends with a question about its beginning; a chunk has {size}.")
        caption = f"Attention in the query's chunk of {size} tokens and before it. Only NoPE layers see earlier chunks."
        self.page.figure(viz.attention.mass(tables.attention.mass(run)), "attention_mass", caption)
        nope = [layer for layer in range(run.meta["num_layers"]) if layer not in run.meta["rope_layers"]]
        before, after = _probabilities(run, self._confined(nope, size, far.text), far.answer)
        self.page.finding(
            f"The model recalls “{far.answer.strip()}” with probability {before:.2f}. With the NoPE layers "
            f"({', '.join(map(str, nope))}) confined to their chunk the probability is {after:.3f}."
        )

    def _confined(self, layers: list[int], size: int, text: str) -> Run:
        """A run in which some layers are confined to chunks."""
        attentions = [self.model.text.layers[layer].self_attn for layer in layers]
        before = [attention.chunk_size for attention in attentions]
        try:
            for attention in attentions:
                attention.chunk_size = size
            return record(self.model, text)
        finally:
            for attention, old in zip(attentions, before, strict=True):
                attention.chunk_size = old

    def image(self) -> None:
        """What every image token is: where it looks, what the tower hands over, which expert takes it."""
        if self.model.vision is None:
            return
        self.page.section("An image")
        content = [{"type": "image", "image": picture(SCENE)}, {"type": "text", "text": QUESTION}]
        prompt = self.model.prompt([{"role": "user", "content": content}], add_generation_prompt=True)
        run = record(self.model, prompt, at=[ROUTER, "image_features"])
        best = tables.logits.top_tokens(run, 3)
        self.page.table(f"{QUESTION} (It is {COLOUR}.)", best, ["rank", "token", "logit", "prob"])
        tokens = tables.vision.tokens(run)
        original = prompt.images[0].original
        caption = "Each image token where it looks: the norm of what the vision tower hands to the text model."
        self.page.figure(viz.vision.tokens(tokens, original, ax=_small(), value="norm"), "image_features", caption)
        if self.clean.meta["moe_layers"]:
            layer = self.clean.meta["moe_layers"][-1]
            caption = f"Each image token where it looks: the expert it was routed to in layer {layer}."
            axes = viz.vision.tokens(tokens, original, ax=_small(), value=f"expert_{layer}")
            self.page.figure(axes, "image_experts", caption)
        with patched(self.model, {"image_features": 0.0}):
            blind = record(self.model, prompt)
        answer = str(best.at[0, "token"])
        before, after = _probabilities(run, blind, answer)
        self.page.finding(
            f"The model answers “{answer}” with probability {before:.2f}; "
            f"with the image features set to zero the probability is {after:.2f}."
        )

    def patch(self) -> None:
        """Which layer carries the name that decides the answer, and at which token."""
        self.page.section("Activation patching")
        prompt = self.clean.prompt
        places = {
            "at the giver": prompt.position(CHANGED, occurrence=-1),
            "at the last token": prompt.input_ids.shape[1] - 1,
        }
        high, low = self._difference(self.clean.logits), self._difference(record(self.model, CORRUPTED).logits)
        effects: dict[str, list[float]] = {column: [] for column in places}
        layers = range(self.clean.meta["num_layers"])
        for layer in layers:
            name = f"layers.{layer}.resid_post"
            for column, position in places.items():
                with patched(self.model, {name: _at(position, self.clean[name])}):
                    logits = record(self.model, CORRUPTED).logits
                effects[column].append((self._difference(logits) - low) / (high - low))
        self.page.text(
            "In a corrupted text Mary gives. Its residual stream is replaced, at one token and in one layer, by that "
            f"of the clean text. 1 means that the logit difference{ANSWER} -{OTHER} is back at {high:.1f}, 0 that "
            f"it stays at {low:.1f}."
        )
        table = pd.DataFrame({"layer": layers, **effects})
        self.page.table("Share of the logit difference that a patch restores", table, list(table.columns))
        axes = Figure(figsize=(6, 3.2)).subplots()
        for (column, shares), color in zip(effects.items(), ("#0072b2", "#d55e00"), strict=True):
            axes.plot(layers, shares, marker="o", color=color, label=column)
        axes.set(xlabel="patched layer (resid_post)", ylabel="restored share of\nlogit difference", ylim=(-0.1, 1.1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        self.page.figure(axes, "patching", "What a patch of one token in one layer restores.")
        moved = next(
            (layer for layer, share in zip(layers, effects["at the last token"], strict=True) if share > 0.5), None
        )
        if moved is not None:
            self.page.finding(f"From layer {moved} on, more than half of the answer is at the last token.")

    def reroute(self) -> None:
        """What the last token would say had it gone to another expert."""
        if not self.clean.meta["moe_layers"]:
            return
        self.page.section("Re-routing a token")
        end = self.clean.logits.shape[1] - 1
        gates = self.clean.layers("feed_forward.router.gates")
        layer = max(gates, key=lambda layer: gates[layer][0, end].max().item())  # a weak gate all but mutes its expert
        router = f"layers.{layer}.feed_forward.router"
        chosen, rows = self.clean[f"{router}.indices"], []
        for expert in range(self.clean.meta["num_experts"]):
            with patched(self.model, {f"{router}.indices": _at(end, torch.full_like(chosen, expert))}):
                run = record(self.model, CLEAN, at=f"{router}.gates")
            gate, taken = run[f"{router}.gates"][0, end, 0].item(), expert in chosen[0, end].tolist()
            rows.append({"expert": expert, "chosen": "yes" if taken else "", "gate": gate})
            rows[-1]["logit difference"] = self._difference(run.logits)
        rows.sort(key=lambda row: -row["logit difference"])
        self.page.text(
            f"In layer {layer}, where its gate is strongest, the last token goes to every expert in turn, with the "
            "gate of that expert's own logit."
        )
        columns = ["expert", "chosen", "gate", "logit difference"]
        self.page.table(f"Logit difference{ANSWER} -{OTHER} under each expert", pd.DataFrame(rows).head(8), columns)
        own = next(row for row in rows if row["chosen"])
        self.page.finding(
            f"The router chose expert {own['expert']}, with a logit difference of {own['logit difference']:.1f}. "
            f"It is highest, {rows[0]['logit difference']:.1f}, under expert {rows[0]['expert']}, and lowest, "
            f"{rows[-1]['logit difference']:.1f}, under expert {rows[-1]['expert']}."
        )

    def _difference(self, logits: Tensor) -> float:
        prompt = self.clean.prompt
        return (logits[0, -1, prompt.token_id(ANSWER)] - logits[0, -1, prompt.token_id(OTHER)]).item()


def _small() -> Axes:
    return Figure(figsize=(4.5, 3.6)).subplots()


def _probabilities(before: Run, after: Run, token: str) -> tuple[float, float]:
    """The probability of a next token in two runs."""
    both: dict[str, Any] = tables.logits.compare(before, after, tokens=[token]).to_dict("records")[0]
    return both["prob_before"], both["prob_after"]


def _at(position: int, value: Tensor) -> Callable[[Tensor], Tensor]:
    """A patch that takes `value` at one position only."""

    def replace(x: Tensor) -> Tensor:
        return torch.cat([x[:, :position], value[:, position : position + 1].to(x), x[:, position + 1 :]], dim=1)

    return replace
