"""Random damage to the bytes of a checkpoint: it is read as before or refused in words, never anything else."""

import random

import pytest
import torch
from safetensors.torch import load_file

SEEDS = range(20)
MUTATIONS = 20  # for each seed


def mutated(data: bytes, generator: random.Random, stop: int) -> bytes:
    """Changes, inserts, removes or doubles a few bytes before that position."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        if len(changed) < 20:
            break
        place = generator.randrange(min(stop, len(changed)))
        kind = generator.randrange(20)
        if kind < 6:
            changed[place] ^= 1 << generator.randrange(8)
        elif kind < 12:
            changed[place] = generator.choice(b'0123456789{}[]",:-.eE\0\xff')
        elif kind < 15:
            del changed[place : place + generator.randint(1, 9)]
        elif kind < 19:
            changed[place:place] = changed[place : place + generator.randint(1, 30)]
        else:
            del changed[generator.randrange(1, len(changed) + 1) :]
    return bytes(changed)


def read_or_refused(make, folder):
    """The tensors, or None after a ValueError that says where. Anything else is an error of the reader."""
    refusal = str(folder)
    read = None
    try:
        read = make.opened(folder)
    except ValueError as error:
        refusal = str(error)
    assert str(folder) in refusal
    return read


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mutated_header_is_refused_or_gives_the_shapes_of_the_model(make, checkpoint, seed):
    generator = random.Random(seed)
    file = checkpoint / "model.safetensors"
    good, shapes = file.read_bytes(), {name: tensor.shape for name, tensor in load_file(file).items()}
    for _ in range(MUTATIONS):
        file.write_bytes(mutated(good, generator, 8 + int.from_bytes(good[:8], "little")))
        read = read_or_refused(make, checkpoint)
        if read is not None:
            assert {name: tensor.shape for name, tensor in read.items()} == shapes
            assert all(tensor.isfinite().all() for tensor in read.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mutated_config_is_refused_or_describes_the_same_weights(make, checkpoint, seed):
    generator = random.Random(seed)
    file = checkpoint / "config.json"
    good, expected = file.read_bytes(), load_file(checkpoint / "model.safetensors")
    for _ in range(MUTATIONS // 2):
        file.write_bytes(mutated(good, generator, len(good)))
        read = read_or_refused(make, checkpoint)
        if read is not None:
            assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
