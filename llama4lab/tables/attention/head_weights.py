"""The maps of a head as its weights give them: token embeddings to queries, keys and values, and values to logits.

Modules are called rather than their weights read, so that it makes no difference where the weights wait or how they are
stored.
"""

# torch declares submodules as tensors or modules.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama4lab.model.attention import SelfAttention
from llama4lab.model.norm import rms_normalised
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.model.rope import rotated
from llama4lab.run.unembedding import Unembedding, input_device

ROWS = 4096  # tokens that are read at a time


@torch.no_grad()
def output_directions(
    model: HookedPreTrainedModel, attention: SelfAttention, head: int
) -> Float[Tensor, "d_head d_model"]:
    """What each dimension of a head writes into the residual stream, in float32: its part of the output projection."""
    project = attention.o_proj
    units = torch.zeros(attention.d_head, attention.config.num_attention_heads * attention.d_head, dtype=model.dtype)
    units[:, head * attention.d_head :][:, : attention.d_head].fill_diagonal_(1.0)
    place = input_device(project, model.device)
    none = torch.zeros_like(units[:1]) if project.bias is not None else units[:0]
    written = project(torch.cat([units, none]).to(place)).float()
    return written[:-1] - written[-1:] if len(none) else written


def kv_head_of(attention: SelfAttention, head: int) -> int:
    """The head of keys and values that a query head reads."""
    return head // (attention.config.num_attention_heads // attention.config.num_key_value_heads)


def projected(
    model: HookedPreTrainedModel, layer: int, ids: Int[Tensor, " token"], project: nn.Linear
) -> Float[Tensor, "token any_head d_head"]:
    """What a projection of a layer gives for bare embeddings, in float32."""
    norm, embed = model.text.layers[layer].input_layernorm, model.get_input_embeddings()
    parts = []
    for own in ids.split(ROWS):
        x = embed(own.to(input_device(embed, model.device)))
        x = norm(x.to(input_device(norm, model.device)))
        parts.append(project(x.to(input_device(project, model.device))).float())
    return torch.cat(parts).unflatten(-1, (-1, model.text.config.head_dim))


def bias_of(project: nn.Linear, d_head: int) -> Float[Tensor, "any_head d_head"]:
    with align_module_device(project):
        bias = torch.zeros(project.out_features) if project.bias is None else project.bias.float().clone()
    return bias.unflatten(-1, (-1, d_head))


def raised_logits(model: HookedPreTrainedModel, attention: SelfAttention, head: int) -> Float[Tensor, "vocab d_head"]:
    """What each dimension of a head adds to every logit, without what it adds to all of them alike."""
    unembedding = Unembedding(model)
    with align_module_device(unembedding.norm):
        weight = unembedding.norm.weight.float().clone()
    directions = output_directions(model, attention, head)
    directions = directions * weight.to(directions.device)
    chunks = unembedding.chunks(len(directions))
    raised = torch.cat([unembedding.logits(directions[own], normed=True) for own in chunks])
    return (raised - raised.mean(1, keepdim=True)).mT


def turned(
    model: HookedPreTrainedModel, attention: SelfAttention, x: Float[Tensor, "token d_head"], position: int
) -> Float[Tensor, "token d_head"]:
    """Queries or keys as the scores are made from them, all at one position."""
    if attention.rope:
        rotate = model.text.rotary_emb if attention.rotate is None else attention.rotate
        x = rotated(x[:, None, None], rotate(torch.tensor([[position]], device=x.device)))[:, 0, 0]
    return rms_normalised(x, attention.config.rms_norm_eps) if attention.qk_norm else x
