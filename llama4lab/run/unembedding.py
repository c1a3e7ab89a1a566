"""The way out of the model: the final norm and the output matrix, applied to any vector of the residual stream.

The modules are called rather than their weights read, so that it makes no difference where the weights wait or how
they are stored.
"""

from collections.abc import Iterator

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama4lab.model.norm import RMSNorm
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.metrics import Tokens

# Of logits in float32 at a time: with 200,000 tokens, 83 vectors. What is made of them takes about six times as much.
CHUNK_NBYTES = 2**26


class Unembedding:
    """The final norm and the output matrix of a model.

    Attributes:
        norm: The final norm.
        head: The output matrix.
        vocab: How many tokens there are.
    """

    def __init__(self, model: HookedPreTrainedModel):
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        self.norm: RMSNorm = model.text.norm
        self.head = head
        self.vocab = int(model.text.config.vocab_size)
        self.dtype = model.dtype
        self._device = model.device

    def logits(self, x: Float[Tensor, "n d_model"], *, normed: bool = False) -> Float[Tensor, "n vocab"]:
        """The logits of vectors, in float32.

        Args:
            x: Vectors of the residual stream.
            normed: Whether they have passed the final norm.
        """
        x = x.to(self._place(self.norm), self.dtype)
        normed_x = x if normed else self.norm(x)
        return self.head(normed_x.to(self.device)).float()

    @property
    def device(self) -> torch.device:
        """Where the logits are computed."""
        return self._place(self.head)

    @property
    def rows_at_a_time(self) -> int:
        """How many vectors may have their logits in memory together."""
        return max(1, CHUNK_NBYTES // (4 * self.vocab))

    def chunks(self, count: int) -> Iterator[slice]:
        """Cuts so many vectors into pieces whose logits may be in memory at a time."""
        size = self.rows_at_a_time
        return (slice(first, min(first + size, count)) for first in range(0, count, size))

    def directions(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """For each token what the normed vector is multiplied with to give its logit: its row of the output matrix.

        Raises:
            IndexError: if the vocabulary has no such token.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab:
            raise IndexError(
                f"Token {int(ids.max())} was asked for, lowest {int(ids.min())}; the ids are 0 to {self.vocab - 1}."
            )
        # A row is the slope of a logit; of a quantized matrix it could not be read.
        kept, place = ids.unique(return_inverse=True)
        rows = []
        for own in self.chunks(len(kept)):
            with torch.enable_grad():
                x = torch.zeros(own.stop - own.start, self.norm.weight.shape[0], dtype=self.dtype)
                x = x.to(self.device).requires_grad_()
                logits = self.head(x)
                total = logits.gather(-1, kept[own, None].to(logits.device)).sum()
            rows.append(torch.autograd.grad(total, x)[0].float().cpu())
        return torch.cat(rows)[place.cpu()] if rows else torch.zeros(0, self.norm.weight.shape[0])

    def through_norm(
        self, directions: Float[Tensor, "n d_model"], x: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n d_model"]:
        """Directions on the far side of the final norm, as directions of the residual stream.

        The scale of the norm is frozen at what it is for x. Then the norm is linear, and whatever is a sum in the
        residual stream is a sum of shares in the logit.

        Args:
            directions: What normed vectors are multiplied with.
            x: The vectors of the residual stream that the norm sees.
        """
        with align_module_device(self.norm):
            weight = self.norm.weight.detach().float().cpu()
        scale = torch.rsqrt(x.detach().float().cpu().pow(2).mean(-1, keepdim=True) + self.norm.eps)
        return directions.cpu() * weight * scale

    def _place(self, module: nn.Module) -> torch.device:
        return input_device(module, self._device)


def input_device(module: nn.Module, other: torch.device) -> torch.device:
    """Where the input of a module goes: to its weights, or, while they wait elsewhere, to `other`.

    What brings offloaded weights back moves the input, too.
    """
    own = next(iter(module.parameters(recurse=False)), None)
    return other if own is None or own.device.type == "meta" else own.device


def token_ids(tokens: Tokens, prompt: Prompt) -> Int[Tensor, " row"]:
    """The id of a token for each row of a prompt.

    Args:
        tokens: A token (text or id), or one for each row.
        prompt: The prompt, whose tokenizer reads text.

    Raises:
        ValueError: if text is not one token, or there are not as many tokens as rows.
    """
    each = [tokens] * len(prompt) if isinstance(tokens, str | int) else list(tokens)
    if len(each) != len(prompt):
        raise ValueError(
            f"{len(each)} tokens were given for the {len(prompt)} rows of the prompt; give one, or one each."
        )
    return torch.tensor([prompt.token_id(token) if isinstance(token, str) else int(token) for token in each])
