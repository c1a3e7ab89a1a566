"""The numbers that 4 and 8 bits stand for, one by one from sign, exponent and mantissa."""

import numpy as np


def _table(exponent_bits: int, mantissa_bits: int, special: dict[int, float]) -> np.ndarray:
    """The number of every pattern of bits; `special` has those of the upper half that mean something else."""
    half, bias = 2 ** (exponent_bits + mantissa_bits), 2 ** (exponent_bits - 1) - 1
    table = []
    for code in range(half):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        share = mantissa / 2**mantissa_bits
        # Exponent 0 stands for numbers without the leading 1.
        normal = (1 + share) * 2.0 ** (exponent - bias)
        number = normal if exponent else share * 2.0 ** (1 - bias)
        table.append(special.get(code, number))
    return np.array([*table, *(-number for number in table)], dtype=np.float32)


E2M1 = _table(2, 1, {})
E4M3 = _table(4, 3, {0x7F: np.nan})
E5M2 = _table(5, 2, {0x7C: np.inf, 0x7D: np.nan, 0x7E: np.nan, 0x7F: np.nan})
