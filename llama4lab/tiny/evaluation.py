"""The figures of the card, measured on held-out documents: `python -m llama4lab.tiny.evaluation [FOLDER]`."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn

from llama4lab.model.llama4 import HookedLlama4
from llama4lab.tiny import specialisation
from llama4lab.tiny.architecture import CHUNK
from llama4lab.tiny.domains import induction, recall
from llama4lab.tiny.domains.catalogue import DRAWS
from llama4lab.tiny.export import HERE
from llama4lab.tiny.packing import GROUPS, Packer
from llama4lab.tiny.progress import answers, documents, padded


def open_checkpoint(folder: Path = HERE) -> tuple[HookedLlama4, Packer]:
    """The checkpoint of a folder in float32, ready to measure, and a packer with its tokenizer."""
    model = HookedLlama4.from_pretrained(folder, dtype=torch.float32).eval()
    return model, Packer(Tokenizer.from_file(str(folder / "tokenizer.json")))


def accuracy(model: HookedLlama4, packer: Packer, domain: str, n: int, split: str = "test") -> float:
    """The share of answer tokens of `n` documents, by default held-out ones, that the model ranks first."""
    _, right, _ = answers(model, padded(packer, documents(domain, n, split=split)))
    return right.mean().item()


def copying(
    model: HookedLlama4, packer: Packer, n: int, length: int = 25
) -> tuple[float, float, Float[Tensor, "layer head"]]:
    """Loss on the first and on the second round of random sequences, and every head's induction score.

    The score of a head is its mean attention, from a word of the second round, to the word that followed the same word
    in the first round.
    """
    rng = random.Random("copying")
    sequences = [induction.repeated(rng.sample(induction.WORDS, length), 2) for _ in range(n)]
    ids = padded(packer, sequences).ids
    patterns: list[Tensor] = []
    points = [layer.self_attn.pattern for layer in model.text.layers]
    handles = [point.register_forward_hook(partial(_note, patterns)) for point in points]
    try:
        with torch.no_grad():
            logits = model(input_ids=ids).logits
    finally:
        for handle in handles:
            handle.remove()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    # Token 0 begins the text; the second round starts at length + 1, and its first word cannot be known.
    queries = torch.arange(length + 1, 2 * length)
    scores = torch.stack([pattern[:, :, queries, queries - length + 1].mean((0, 2)) for pattern in patterns])
    return losses[:, :length].mean().item(), losses[:, length + 1 :].mean().item(), scores


def _note(patterns: list[Tensor], _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
    patterns.append(output)


@contextmanager
def barred(model: HookedLlama4) -> Iterator[None]:
    """Within the block the NoPE layers see no farther than the chunk of the query, like the RoPE layers."""
    layers = [layer.self_attn for layer in model.text.layers if layer.self_attn.chunk_size is None]
    for layer in layers:
        layer.chunk_size = CHUNK
    try:
        yield
    finally:
        for layer in layers:
            layer.chunk_size = None


def far_recall(model: HookedLlama4, packer: Packer, n: int) -> tuple[float, float]:
    """Accuracy on owners named 90 to 120 tokens ago, and the same with the NoPE layers barred from other chunks."""
    rng = random.Random("far recall")
    rows = padded(packer, [recall.draw_far(rng, rng.randint(90, 120)) for _ in range(n)])
    free = answers(model, rows)[1].mean().item()
    with barred(model):
        return free, answers(model, rows)[1].mean().item()


def looking(model: HookedLlama4, packer: Packer, n: int) -> tuple[float, float]:
    """Accuracy on questions about drawn shapes, and the same when every question gets another question's image."""
    rows = padded(packer, documents("shapes", n, split="test"))
    pixels = rows.pixel_values()
    assert pixels is not None
    return answers(model, rows)[1].mean().item(), answers(model, rows, pixels.roll(1, 0))[1].mean().item()


def figures(model: HookedLlama4, packer: Packer, n: int = 400) -> dict[str, float]:
    """All figures of the card but those of single experts, by name."""
    first, second, scores = copying(model, packer, n // 4)
    free, confined = far_recall(model, packer, n // 4)
    _, shuffled = looking(model, packer, n)
    named = {f"{domain} accuracy": accuracy(model, packer, domain, n) for domain in DRAWS if "far" not in domain}
    return named | {
        "arithmetic accuracy, pairs seen in training": accuracy(model, packer, "arithmetic", n, "train"),
        "induction loss, first round": first,
        "induction loss, second round": second,
        "best induction score": scores.max().item(),
        "far recall accuracy": free,
        "far recall accuracy, NoPE layers barred": confined,
        "shapes accuracy, images shuffled": shuffled,
    }


def main(folder: Path) -> None:
    """Prints every figure."""
    model, packer = open_checkpoint(folder)
    for name, value in figures(model, packer).items():
        print(f"{name:42} {value:.3f}")
    rows = specialisation.held_out(packer, 40)
    loads = specialisation.expert_load(model, rows)
    print("\nlayer: smallest and largest expert load; information with domains (random initialisation), nats")
    drawn = specialisation.information(specialisation.untrained(model), rows)
    for layer, value in specialisation.information(model, rows).items():
        load = loads[layer]
        print(f"{layer}: {load.min():.3f} {load.max():.3f}; {value:.3f} ({drawn[layer]:.3f})")
    print("\nexperts by how far their ablation hits one domain (loss rise there, median rise elsewhere)")
    for layer, expert, group, hit, others in specialisation.ranking(specialisation.ablation(model, rows))[:12]:
        print(f"L{layer}E{expert} {GROUPS[group]:18} {hit:.2f} {others:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
