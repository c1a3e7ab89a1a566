"""Scaled RoPE in GGUF: a tensor with the factor by which each frequency is divided, in the place of its settings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

# The settings that Llama models have been published with; the factor itself is the largest of the tensor.
LOW_HIGH = ((1.0, 1.0), (1.0, 4.0))
CLOSE = 1e-5


def scaled_rope(base: float, factors: Sequence[float] | None, head_dim: int, original: int) -> dict[str, Any]:
    """Gives the `rope_parameters` of a config that divide the frequencies by these factors.

    Args:
        base: The base of the frequencies.
        factors: One for each frequency; None if they are not scaled.
        head_dim: Width of a head, twice the number of frequencies.
        original: The context length before it was scaled.

    Raises:
        ValueError: if the factors follow from no known settings.
    """
    if factors is None:
        return {"rope_type": "default", "rope_theta": base}
    largest = max(factors)
    nearest = math.inf, ""
    for low, high in LOW_HIGH:
        rope = {"rope_type": "llama3", "rope_theta": base, "factor": largest, "low_freq_factor": low}
        rope |= {"high_freq_factor": high, "original_max_position_embeddings": original}
        off = difference(rope, factors, head_dim)
        if off <= CLOSE:
            return rope
        nearest = min(nearest, (off, f"factor {largest:g}, low {low:g}, high {high:g}, context {original:,}"))
    raise ValueError(
        f"they differ by {nearest[0]:.2g} from the nearest known settings ({nearest[1]}).\n"
        "Put the config.json of the model beside the file; its rope_parameters are compared with the tensor"
    )


def difference(rope: Mapping[str, Any], factors: Sequence[float] | None, head_dim: int) -> float:
    """Gives by how much, at most and relatively, factors differ from those that settings imply."""
    implied = implied_factors(rope, head_dim)
    found = [1.0] * len(implied) if factors is None else list(factors)
    if len(found) != len(implied):
        return math.inf
    off = (abs(one / other - 1) if math.isfinite(one) else math.inf for one, other in zip(found, implied, strict=True))
    return max(off)


def implied_factors(rope: Mapping[str, Any], head_dim: int) -> list[float]:
    """Gives by what Llama 3's scaling divides each frequency: 1 for short waves, `factor` for long ones.

    Raises:
        ValueError: if the settings are of another kind of scaling.
    """
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.get("rope_type", "default") == "default":
        return [1.0] * len(frequencies)
    if rope["rope_type"] != "llama3":
        raise ValueError(f"config.json says RoPE of type {rope['rope_type']!r}, which a GGUF file cannot express")
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    made: list[float] = []
    for frequency in frequencies.tolist():
        turns = original * frequency / (2 * math.pi)  # within the original context
        if turns >= high:
            made.append(1.0)
        elif turns < low:
            made.append(factor)
        else:
            part = (turns - low) / (high - low)
            made.append(1 / ((1 - part) / factor + part))
    return made
