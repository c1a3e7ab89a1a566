"""Which tensor on disk was read for what."""

import re
from collections import defaultdict

import pandas as pd

from llama4lab.checkpoint.quantization import is_for_activations
from llama4lab.checkpoint.weights import Weights

FOR_ACTIVATIONS = "activations only (not used)"

# What a tensor is, by the end of its name; the first that matches counts.
ROLES = {
    r"zero_point$": "zero point",
    r"g_idx$": "order of columns",
    r"weight_shape$": "shape",
    r"quant_map$": "table",
    r"quant_state\.\w+$": "settings",
    r"(scale|scales|scale_2|scale_inv|absmax)$": "scale",
    r"\.biases$": "offset",
    r"\.bias$": "bias",
}


def stored_tensors(weights: Weights) -> pd.DataFrame:
    """Gives one line for each tensor on disk, in the order of the files.

    Args:
        weights: The checkpoint, opened for its model.

    Columns:
        file: name of its file; of several that have a share of it, the first.
        tensor: its name on disk; of tensors that Meta's ranks share out, that of the whole in the model.
        dtype: in which it is stored; of packed blocks, their kind.
        shape: its shape, in words as "[8, 128]".
        bytes: its size.
        role: "weight", "bias", "scale", "zero point", "offset", "table", "settings", "shape" or "order of columns".
        read_by: the tensor of the model that it is a part of (several with commas), or "activations only (not used)";
            "" if nothing reads it.
    """
    files, readers = weights.shards, defaultdict[str, list[str]](list)
    for name in weights.counts():
        for on_disk in dict.fromkeys(weights.on_disk(name)):
            readers[on_disk].append(name)
    lines = []
    for name in sorted(files, key=lambda name: (str(files.file(name)), files.spec(name).start)):
        spec = files.spec(name)
        lines.append(
            {
                "file": files.file(name).name,
                "tensor": files.own_name(name),
                "dtype": str(spec.dtype).removeprefix("torch.") if spec.scheme is None else spec.scheme.name,
                "shape": str(list(spec.shape)),
                "bytes": files.nbytes(name),
                "role": next((role for end, role in ROLES.items() if re.search(end, name)), "weight"),
                "read_by": ", ".join(readers[name]) or (FOR_ACTIVATIONS if is_for_activations(name) else ""),
            }
        )
    return pd.DataFrame(lines, columns=["file", "tensor", "dtype", "shape", "bytes", "role", "read_by"])
