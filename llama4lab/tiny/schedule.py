"""The stages of training, counted in steps: which documents, how many rows, which chunk, which learning rate."""

from collections.abc import Mapping
from dataclasses import dataclass

from llama4lab.tiny.architecture import CHUNK, LONG

ALL: dict[str, float] = {
    "induction": 2.0,
    "indirect_objects": 8.0,
    "facts": 14.0,
    "arithmetic": 10.0,
    "code": 6.0,
    "translation": 14.0,
    "recall": 3.0,
    "far_recall": 1.5,
    "far_induction": 0.3,
    "shapes": 5.0,
    "chat": 8.0,
}
MORE_IMAGES = ALL | {"shapes": 8.0}
MOST_IMAGES = ALL | {"shapes": 16.0, "facts": 18.0, "arithmetic": 16.0}
SEARCHING: dict[str, float] = {"shape_search": 4.0, "shapes": 1.0}
COPYING: dict[str, float] = {"induction": 3.0, "recall": 3.0, "indirect_objects": 1.0}


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass: the mixture of domains, the chunk sizes that the steps take in turn, and the share of
    its loss in the step's.
    """

    mixture: Mapping[str, float]
    rows: int
    length: int
    chunks: tuple[int, ...] = (CHUNK,)
    share: float = 1.0


@dataclass(frozen=True)
class Stage:
    """A number of steps with one kind of batches.

    The learning rate runs linearly from `lr` to `last_lr`; that of the vision tower is `vision_rate` times as high.
    """

    name: str
    steps: int
    lr: float
    last_lr: float
    batches: tuple[Batch, ...]
    vision_rate: float = 1.0


WARM_UP = 150
VISION = Stage("vision", 1200, 2e-3, 2e-4, ())
VISION_IMAGES = 48

CHUNKS = (8, 16, 32, CHUNK)
# Copying under a small chunk is what moves the induction head into the NoPE layers: inside a chunk of 8 or 16 tokens
# a RoPE layer cannot see the first round of a sequence. Long rows alone never made that happen.
STAGES = (
    Stage("all", 1300, 2e-3, 2e-3, (Batch(ALL, 8, LONG), Batch(COPYING, 16, CHUNK, CHUNKS))),
    Stage("copy", 3200, 2e-3, 2e-3, (Batch(MORE_IMAGES, 8, LONG), Batch(COPYING, 16, CHUNK, CHUNKS)), 0.1),
    Stage("settle", 800, 2e-3, 1.36e-3, (Batch(MORE_IMAGES, 10, LONG), Batch(COPYING, 8, CHUNK, (16, 32))), 0.1),
    Stage("finish", 3400, 1.36e-3, 0.0, (Batch(MOST_IMAGES, 10, LONG), Batch(COPYING, 4, CHUNK, (16, 32))), 0.1),
    Stage("search", 1300, 1.2e-3, 0.0, (Batch(ALL, 4, LONG), Batch(SEARCHING, 24, CHUNK)), 0.05),
)
STEPS = sum(stage.steps for stage in STAGES)


def stage_at(step: int) -> tuple[Stage, float]:
    """The stage and the learning rate of a step (the vision stage before it is not counted)."""
    start = 0
    for stage in STAGES:
        if step < start + stage.steps:
            return stage, rate(stage, step - start, step)
        start += stage.steps
    raise ValueError(f"step {step} is after the end of the schedule\nit has {STEPS} steps")


def rate(stage: Stage, done: int, step: int) -> float:
    """The learning rate after `done` steps of a stage; `step` counts from the start of training, for the warm-up."""
    return min(1.0, (step + 1) / WARM_UP) * (stage.lr + (stage.last_lr - stage.lr) * done / stage.steps)


def chunk_at(batch: Batch, step: int) -> int:
    """The chunk size of a batch in a step."""
    return batch.chunks[step % len(batch.chunks)]
