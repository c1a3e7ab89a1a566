"""What a forward pass gives, and the cache under its two names.

transformers 5.24 gave two things other names: a cache, in arguments and outputs, is `cache` and no longer
`past_key_values`; an output holds `image_outputs` and no longer `image_hidden_states`. Here both names of each work
with every release, without a warning. This file alone knows which one the installed release speaks.
"""

from dataclasses import fields
from typing import Any, no_type_check

from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llama4.modeling_llama4 import Llama4CausalLMOutputWithPast

FIELDS = {field.name for field in fields(Llama4CausalLMOutputWithPast)}
# The name under which transformers' `generate` hands the cache to a model and finds it in an output.
CACHE = "cache" if "cache" in FIELDS else "past_key_values"


@no_type_check  # the types that transformers writes at its fields are narrower than what they hold, here as there
class Llama4Output(Llama4CausalLMOutputWithPast):
    """The output of both models.

    Attributes:
        cache: Keys and values, if they were asked for; `past_key_values` is the same.
        image_outputs: What `get_image_features` gave, if there were images; `image_hidden_states` is its tensor
            `[tile, image_token, d]`.
    """

    # A property must not hide a field, so each name is a property only where it is none.
    if "cache" in FIELDS:

        @property
        def past_key_values(self) -> Cache | None:
            return self.cache
    else:

        @property
        def cache(self) -> Cache | None:
            return self.past_key_values

    if "image_outputs" in FIELDS:

        @property
        def image_hidden_states(self) -> Any:
            return None if self.image_outputs is None else self.image_outputs.last_hidden_state
    else:

        @property
        def image_outputs(self) -> BaseModelOutputWithPooling | None:
            vectors = self.image_hidden_states
            return None if vectors is None else BaseModelOutputWithPooling(last_hidden_state=vectors)

    def add_images(self, encoded: BaseModelOutputWithPooling) -> None:
        """Notes what the vision tower gave."""
        own = "image_outputs" in FIELDS
        setattr(self, "image_outputs" if own else "image_hidden_states", encoded if own else encoded.last_hidden_state)


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that was passed under either name.

    Raises:
        ValueError: if there are two.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument; pass one of them.")
    return past_key_values if cache is None else cache
