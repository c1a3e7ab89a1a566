"""Llama 4 as transformers models: thin shells around the modules of this folder, with transformers' parameter names."""

from difflib import get_close_matches
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, Llama4Config, Llama4TextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from llama4lab.model.cache import new_cache
from llama4lab.model.captured_outputs import captured
from llama4lab.model.config_parts import text_part, vision_part
from llama4lab.model.hook_point import HookPoint
from llama4lab.model.output import CACHE, Llama4Output, one_cache
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.model.projector import MultiModalProjector
from llama4lab.model.text import TextModel
from llama4lab.model.token_layout import token_layout
from llama4lab.model.vision import VisionModel

# What the loss function of transformers takes besides logits and labels.
LOSS_OPTIONS = {"num_items_in_batch", "ignore_index", "shift_labels"}
ARGUMENTS = ["attention_mask", "position_ids", "cache", "past_key_values", "inputs_embeds", "labels", "use_cache"]
ARGUMENTS += ["logits_to_keep", "output_attentions", "output_hidden_states", "output_router_logits", "pixel_values"]


class HookedLlama4ForCausalLM(HookedPreTrainedModel, GenerationMixin):
    """The text model with its head. Parameter names are those of transformers' `Llama4ForCausalLM`."""

    config_class = Llama4TextConfig
    config: Llama4TextConfig
    published_name = "Llama4ForCausalLM"
    base_model_prefix = "model"
    input_modalities: Any = ("text",)
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: Llama4TextConfig):
        super().__init__(config)
        self.model = TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.logits = HookPoint("batch seq vocab")
        self.post_init()

    @property
    def text(self) -> TextModel:
        return self.model

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Int[Tensor, "#batch seq"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch seq d_model"] | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        past_key_values: Cache | None = None,
        **loss_options: Any,
    ) -> Llama4Output:
        """Runs the model.

        Args:
            input_ids: Tokens of this pass; either these or `inputs_embeds`.
            attention_mask: `[batch, past + seq]`, 1 for tokens and 0 for padding; or a 4-D mask, boolean or additive,
                which narrows what each layer allows; or a dict of 4-D masks, one for each kind of layer.
            position_ids: Positions; a restart inside a row begins a new packed document. None counts along the mask.
            cache: A cache filled by this model.
            inputs_embeds: Input vectors instead of tokens.
            labels: Targets, -100 where there is none; shifted inside. Gives `loss`.
            use_cache: Whether to return the cache; by default as the config says, but not in training.
            logits_to_keep: Compute only the last so many positions, or those of an index; 0 for all.
            output_attentions: Whether to return the pattern of every layer (which is then computed eagerly).
            output_hidden_states: Whether to return the input of every layer and, last, the normed output.
            output_router_logits: Whether to return `{layer: [batch, seq, expert]}` for the layers with experts.
            past_key_values: The older name of `cache`.
            loss_options: Handed to the loss function, for example `num_items_in_batch`.

        Raises:
            ValueError: if the inputs contradict each other; the message gives the shapes.
        """
        _check_options(loss_options)
        embedded = self._embedded(input_ids, inputs_embeds, labels)
        cache = one_cache(cache, past_key_values)
        use_cache = self._wants_cache(use_cache, cache)
        if use_cache and cache is None:
            cache = new_cache(self.config, chunks=self.model.chunk_sizes)
        masks, mask = self._split_masks(attention_mask)
        layout = token_layout(
            (embedded.shape[0], embedded.shape[1]),
            embedded.device,
            attention_mask=mask,
            position_ids=position_ids,
            past=0 if cache is None else int(cache.get_seq_length()),
            history=getattr(cache, "token_layout", None),
        )
        wanted = {
            "attentions": self._asked(output_attentions, "output_attentions"),
            "hidden_states": self._asked(output_hidden_states, "output_hidden_states"),
            "router_logits": self._asked(output_router_logits, "output_router_logits"),
        }
        with captured(self.model, wanted) as collected:
            hidden = self.model(embedded, layout, cache, masks)
        if cache is not None:
            cache.token_layout = layout  # pyright: ignore[reportAttributeAccessIssue] - goes with its keys
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(self.lm_head(hidden[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_options)
        return Llama4Output(**collected, **{"loss": loss, "logits": logits, CACHE: cache if use_cache else None})

    def _embedded(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, labels: Tensor | None
    ) -> Float[Tensor, "batch seq d_model"]:
        """The input vectors, checked."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        embedded = self.text.embedded(input_ids) if input_ids is not None else inputs_embeds
        assert embedded is not None
        if embedded.ndim != 3 or embedded.numel() == 0 or embedded.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds has shape {list(embedded.shape)}; pass [batch, seq, {self.config.hidden_size}] "
                "with at least one token."
            )
        if labels is not None and labels.shape != embedded.shape[:2]:
            raise ValueError(f"labels has shape {list(labels.shape)}, but there are {list(embedded.shape[:2])} tokens.")
        return embedded

    def _wants_cache(self, use_cache: bool | None, cache: Cache | None) -> bool:
        if self.model.checkpointing:  # the recomputed layers would write their keys twice
            if cache is not None and int(cache.get_seq_length()):
                raise ValueError("A filled cache does not go with gradient checkpointing; call inside torch.no_grad().")
            return False
        return bool(self.config.use_cache and not self.training) if use_cache is None else use_cache

    def _asked(self, argument: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name, False) if argument is None else argument)

    def _split_masks(self, mask: Any) -> tuple[dict[str, Tensor | None] | None, Tensor | None]:
        """Own masks for the kinds of layers, and the padding mask."""
        if isinstance(mask, dict):
            kinds = set(self.config.layer_types or ())
            if set(mask) != kinds:
                raise ValueError(f"attention_mask has the kinds {sorted(mask)}; the layers are {sorted(kinds)}.")
            return mask, None
        if mask is not None and mask.ndim == 4:
            return {"full_attention": mask, "chunked_attention": mask}, None
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask has {mask.ndim} dimensions; pass [batch, past + seq] or a 4-D mask.")
        return None, mask


def _check_options(options: dict[str, Any]) -> None:
    """A misspelt argument must not vanish."""
    unknown = sorted(set(options) - LOSS_OPTIONS)
    if unknown:
        near = get_close_matches(unknown[0], ARGUMENTS, n=3)
        raise TypeError(f"forward got an unknown argument {unknown[0]!r}. Near names: {', '.join(near) or 'none'}.")


class HookedLlama4(HookedPreTrainedModel, GenerationMixin):
    """Text and vision. Parameter names are those of transformers' `Llama4ForConditionalGeneration`."""

    config_class = Llama4Config
    config: Llama4Config
    published_name = "Llama4ForConditionalGeneration"
    base_model_prefix = "model"
    input_modalities: Any = ("image", "text")
    _tp_plan: ClassVar = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: Llama4Config):
        super().__init__(config)
        self.vision_model = VisionModel(vision_part(config))
        self.multi_modal_projector = MultiModalProjector(config)
        self.language_model = HookedLlama4ForCausalLM(text_part(config))
        self.image_features = HookPoint("tile image_token d_model")
        self.post_init()

    @property
    def text(self) -> TextModel:
        return self.language_model.model

    @property
    def vision(self) -> VisionModel:
        """The vision tower."""
        return self.vision_model

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.language_model.lm_head = new_embeddings

    def get_image_features(self, pixel_values: Float[Tensor, "tile channel height width"], **_: Any):
        """The vision tower's vector for each image token, before the projection to the text model's width."""
        return BaseModelOutputWithPooling(last_hidden_state=self.vision_model(pixel_values))

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"] | None = None,
        pixel_values: Float[Tensor, "tile channel height width"] | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Int[Tensor, "#batch seq"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch seq d_model"] | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        past_key_values: Cache | None = None,
        **options: Any,
    ) -> Llama4Output:
        """Runs the model. What is not said here is as in `HookedLlama4ForCausalLM.forward`, errors too.

        Args:
            input_ids: Tokens of this pass; each image patch token gets the next vector of the vision tower.
            pixel_values: The tiles of all images of the batch, in the order in which their tokens appear.
            attention_mask: As there.
            position_ids: As there.
            cache: As there.
            inputs_embeds: Input vectors instead of tokens, images merged in already.
            labels: As there.
            use_cache: As there.
            logits_to_keep: As there.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, computed before.
            past_key_values: As there.
            options: The `output_...` arguments and those of the loss, as there.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and (encoded is not None or inputs_embeds is not None):
            raise ValueError("Pass pixel_values with input_ids, and without inputs_embeds or mm_encoder_outputs.")
        if pixel_values is not None:
            encoded = self.get_image_features(pixel_values)
        cache = one_cache(cache, past_key_values)
        options |= {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        if encoded is None:
            self._check_no_image(input_ids, cache)
            return self.language_model(input_ids=input_ids, inputs_embeds=inputs_embeds, **options)
        if input_ids is None:
            raise ValueError("mm_encoder_outputs needs input_ids, whose image patch tokens say where the vectors go.")
        vectors = cast(Tensor, encoded.last_hidden_state)
        output = self.language_model(inputs_embeds=self.merged(input_ids, vectors), **options)
        output.add_images(encoded)
        return output

    def _check_no_image(self, input_ids: Tensor | None, cache: Cache | None) -> None:
        """Without images, patch tokens would be read as words. (A model may generate one later.)"""
        if input_ids is None or torch.compiler.is_compiling() or (cache is not None and int(cache.get_seq_length())):
            return
        count = int((input_ids == self.config.image_token_id).sum())
        if count:
            raise ValueError(
                f"The prompt has {count} image patch tokens (id {self.config.image_token_id}), but no pixel_values.\n"
                "Pass what model.prompt(...).inputs() gives."
            )

    def merged(
        self, input_ids: Int[Tensor, "batch seq"], encoded: Float[Tensor, "tile image_token d_adapter"]
    ) -> Float[Tensor, "batch seq d_model"]:
        """The embeddings of the tokens, with the projected image vectors, in order, at the image patch tokens."""
        features, embedded = self.image_features(self.multi_modal_projector(encoded)), self.text.embedded(input_ids)
        places = (input_ids == self.config.image_token_id).to(embedded.device)
        count, have = int(places.sum()), features.shape[0] * features.shape[1]
        if count != have:
            raise ValueError(
                f"The prompt has {count} image patch tokens (id {self.config.image_token_id}), but the images give "
                f"{have} vectors ({features.shape[0]} tiles of {features.shape[1]}).\nBuild it with model.prompt(...)."
            )
        return embedded.masked_scatter(places.unsqueeze(-1), features.to(embedded.device, embedded.dtype))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Hands the pixels to the first step only; later steps find the image in the cache."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if not kwargs.get("is_first_iteration", True) and kwargs.get("use_cache", True):
            inputs.pop("pixel_values", None)
            inputs.pop("mm_encoder_outputs", None)
        return inputs
