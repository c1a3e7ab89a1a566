"""What tells two models, or two corpora, apart: digests that are quick to make."""

import hashlib
import json

import torch
from accelerate.utils import align_module_device
from torch import nn

from llama4lab.model.config_parts import text_part
from llama4lab.model.facts import facts
from llama4lab.model.moe import MixtureOfExperts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.corpus.items import Row


@torch.no_grad()
def model_digest(model: HookedPreTrainedModel) -> str:
    """A digest of the config, the number format, and the weights of all norms and routers.

    Two models that differ in anything else only (one edited matrix, say) have the same one; any further training moves
    the norms and the routers, too.
    """
    text, known = text_part(model.config), facts(model.config, model.text) | {"edits": repr(model.text.edits)}
    digest = hashlib.sha256(json.dumps([known, text.vocab_size, str(model.dtype)]).encode())
    modules: list[nn.Module] = [model.text.norm]
    for layer in model.text.layers:
        modules += [layer.input_layernorm, layer.post_attention_layernorm]
        if isinstance(layer.feed_forward, MixtureOfExperts):
            modules.append(layer.feed_forward.router)
    for module in modules:
        with align_module_device(module):  # offloaded weights are on the meta device between calls
            for weight in module.parameters():
                digest.update(weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def rows_digest(rows: list[Row]) -> str:
    """A digest of tokens, images and labels."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.label}\n{row.num_tiles}\n{len(row.ids)}\n".encode())
        digest.update(row.ids.numpy().tobytes())
        if row.pixels is not None:
            digest.update(row.pixels.float().numpy().tobytes())
    return digest.hexdigest()
