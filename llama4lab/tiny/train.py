"""Trains the tiny checkpoint: `python -m llama4lab.tiny.train [--out DIR] [--resume]`.

Everything is drawn from seeds that depend on the step alone, so a resumed training takes the same steps as one that was
never interrupted.
"""

import argparse
import os
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from llama4lab.model.llama4 import HookedLlama4
from llama4lab.tiny import schedule
from llama4lab.tiny.architecture import CHUNK, initialise, tiny_config
from llama4lab.tiny.drawing import draw_scene
from llama4lab.tiny.export import HERE, export
from llama4lab.tiny.objective import READING, PatchReader, answer_loss, router_loss
from llama4lab.tiny.packing import Packer, patch_labels, scene_pixels
from llama4lab.tiny.progress import report

SEED = 0
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.1, 1.0
SAVE_EVERY, REPORT_EVERY = 100, 250


class Trainer:
    """Model, optimizer and place in the schedule."""

    def __init__(self, out: Path):
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
        self.packer = Packer(tokenizer)
        self.model = HookedLlama4(tiny_config(tokenizer))
        initialise(self.model, SEED)
        self.reader = PatchReader(self.model.config.get_text_config().hidden_size)
        groups = self._groups()
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, lr=0.0)
        self.vision_step = self.step = 0

    def _groups(self) -> list[dict]:
        """Groups of parameters for the optimizer: of the vision tower or not, decayed or not."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in [*self.model.named_parameters(), *self.reader.named_parameters()]:
            seeing = name.startswith(("vision_model", "multi_modal_projector"))
            groups.setdefault((seeing, parameter.ndim > 1 and "embed" not in name), []).append(parameter)
        return [
            {"params": parameters, "weight_decay": WEIGHT_DECAY if decayed else 0.0, "seeing": seeing}
            for (seeing, decayed), parameters in groups.items()
        ]

    def save(self) -> None:
        """Writes the state; a crash leaves the one before."""
        state = {
            "model": self.model.state_dict(),
            "reader": self.reader.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": (self.vision_step, self.step),
        }
        torch.save(state, self.out / "state.tmp")
        os.replace(self.out / "state.tmp", self.out / "state.pt")

    def restore(self) -> None:
        """Reads the state that `save` wrote."""
        state = torch.load(self.out / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.reader.load_state_dict(state["reader"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.vision_step, self.step = state["steps"]

    def look(self) -> float:
        """One step of the vision stage: the tower alone learns to read shape and colour at every image token."""
        rng = random.Random(f"{SEED} vision {self.vision_step}")
        scenes = [draw_scene(rng, rng.choice((1, 1, 2, 2, 3, 4))) for _ in range(schedule.VISION_IMAGES)]
        features = self.model.multi_modal_projector(self.model.vision(scene_pixels(scenes)))
        loss = self.reader.loss(features, patch_labels(scenes))
        loss.backward()
        self._apply(schedule.VISION, schedule.rate(schedule.VISION, self.vision_step, self.vision_step))
        self.vision_step += 1
        return loss.item()

    def advance(self) -> dict[str, float]:
        """One step of the text stages; gives its losses."""
        stage, rate = schedule.stage_at(self.step)
        losses: dict[str, float] = {}
        for index, batch in enumerate(stage.batches):
            rng = random.Random(f"{SEED} {self.step} {index}")
            rows = self.packer.pack(batch.mixture, batch.rows, batch.length, rng)
            chunk = schedule.chunk_at(batch, self.step)
            self._set_chunk(chunk)
            pixels = rows.pixel_values()
            output = self.model(input_ids=rows.ids, pixel_values=pixels, output_router_logits=True)
            answers = answer_loss(output.logits, rows.ids, rows.weights)
            router = router_loss(output.router_logits.values(), rows.groups)
            loss = answers + router if index == 0 else answers
            if pixels is not None:
                features = self.model.multi_modal_projector(output.image_hidden_states)
                reading = self.reader.loss(features, patch_labels(rows.scenes))
                loss = loss + READING * reading
                losses["reading"] = reading.item()
            (loss * batch.share).backward()
            losses[f"answers{index}@{chunk}"], losses[f"router{index}"] = answers.item(), router.item()
        self._set_chunk(CHUNK)
        self._apply(stage, rate)
        self.step += 1
        return losses

    def _set_chunk(self, chunk: int) -> None:
        for layer in self.model.text.layers:
            if layer.self_attn.rope:
                layer.self_attn.chunk_size = chunk

    def _apply(self, stage: schedule.Stage, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * (stage.vision_rate if group["seeing"] else 1.0)
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(out: Path, resume: bool = False) -> None:
    """Runs the whole schedule, from the last saved state if `resume`; leaves the checkpoint in `out`."""
    trainer = Trainer(out)
    if resume and (out / "state.pt").exists():
        trainer.restore()
    trainer.model.train()
    start = time.monotonic()
    while trainer.vision_step < schedule.VISION.steps:
        loss = trainer.look()
        if trainer.vision_step % SAVE_EVERY == 0:
            trainer.save()
            print(f"vision {trainer.vision_step} loss {loss:.3f} {time.monotonic() - start:.0f} s", flush=True)
    while trainer.step < schedule.STEPS:
        losses = trainer.advance()
        if trainer.step % 50 == 0:
            shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            print(f"step {trainer.step} {shown} {time.monotonic() - start:.0f} s", flush=True)
        if trainer.step % SAVE_EVERY == 0 or trainer.step == schedule.STEPS:
            trainer.save()
        if trainer.step % REPORT_EVERY == 0 or trainer.step == schedule.STEPS:
            found = report(trainer.model, trainer.packer)
            shown = " ".join(f"{name} {right:.2f}/{loss:.2f}" for name, (right, loss) in found.items())
            print(f"validation {trainer.step} {shown} {time.monotonic() - start:.0f} s", flush=True)
            export(trainer.model, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tiny-training"), help="folder of checkpoint and state")
    parser.add_argument("--resume", action="store_true", help="go on from the state in that folder")
    arguments = parser.parse_args()
    train(arguments.out, arguments.resume)


if __name__ == "__main__":
    main()
