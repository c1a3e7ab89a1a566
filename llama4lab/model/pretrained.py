"""What the text model and the multimodal model share: their place among transformers' models."""

import copy
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, Llama4Config, Llama4TextConfig, PreTrainedModel
from transformers import initialization as init

from llama4lab.model.cache import new_cache
from llama4lab.model.config_parts import text_part
from llama4lab.model.expert_store import ExpertStore
from llama4lab.model.experts import Experts
from llama4lab.model.hook_points import HookPoints, hook_points
from llama4lab.model.output import CACHE, one_cache
from llama4lab.model.promptable import Promptable
from llama4lab.model.text import TextModel
from llama4lab.model.vision import VisionModel

# llama4lab's names of attention kernels -> transformers' names.
KERNELS = {"auto": "sdpa", "sdpa": "sdpa", "eager": "eager", "flex": "flex_attention"}


class HookedPreTrainedModel(Promptable, PreTrainedModel):
    """The base of both models.

    Attributes:
        published_name: The name of the class in transformers, which other tools look for in config.json.
        folder: Where the checkpoint was loaded from, or None.
        store: What the routed experts are fetched from, if they wait on disk.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _no_split_modules: ClassVar = ["TextLayer", "VisionLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values", "cache"]
    config: Llama4Config | Llama4TextConfig
    loss_type = "ForCausalLM"
    published_name: str
    folder: Path | None = None
    store: ExpertStore | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            std = text_part(self.config).initializer_range
            init.normal_(module.get_parameter("gate_up_proj"), mean=0.0, std=std)
            init.normal_(module.get_parameter("down_proj"), mean=0.0, std=std)
        elif isinstance(module, VisionModel):
            init.normal_(module.class_embedding, std=module.config.hidden_size**-0.5)
            init.normal_(module.positional_embedding_vlm, std=module.config.hidden_size**-0.5)

    def hook_points(self) -> HookPoints:
        """Every hook point by name, with its shape in words."""
        return hook_points(self)

    @property
    def attn(self) -> str:
        """The attention kernel; assign one of these names to change it.

        - "auto": torch's fused kernel, chunk by chunk and document by document, without masks.
        - "sdpa": torch's fused kernel on all keys at once under a dense mask, the very calls of transformers.
        - "eager": scores, softmax and sums step by step.
        - "flex": torch's compiled flex kernel.

        Layers whose scores or pattern are watched go step by step whichever kernel is set.
        """
        kernel = {"eager": "eager", "flex_attention": "flex"}.get(str(self.text.config._attn_implementation), "auto")
        return "sdpa" if kernel == "auto" and self.text.layers[0].self_attn.dense_mask else kernel

    @attn.setter
    def attn(self, kernel: str) -> None:
        if kernel not in KERNELS:
            raise ValueError(f"attn={kernel!r} is not an attention kernel; choose from {', '.join(KERNELS)}.")
        # Setting it on a config sets it on the parts too; transformers' own method warns of parts that are no
        # `PreTrainedModel`, as the vision tower is none here.
        self.config._attn_implementation = KERNELS[kernel]
        for layer in self.text.layers:
            layer.self_attn.dense_mask = kernel == "sdpa"

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the weights, or, of weights that wait elsewhere, the one they are used on."""
        own = super().device
        if own.type != "meta":
            return own
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        used = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(device) for device in used if device is not None), own)

    @property
    def text(self) -> TextModel:
        """The text stack."""
        raise AttributeError(f"{type(self).__name__} has no text stack")

    @property
    def vision(self) -> VisionModel | None:
        """The vision tower, if there is one."""
        return None

    def get_input_embeddings(self) -> nn.Module:
        return self.text.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.text.embed_tokens = value

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes the checkpoint as transformers does, under the name of the class that other tools know."""
        super().save_pretrained(save_directory, **options)
        if options.get("is_main_process", True):
            config = copy.deepcopy(self.config)
            config.architectures = [self.published_name]
            config.save_pretrained(save_directory)

    @wraps(GenerationMixin.generate)  # pyright: ignore[reportAttributeAccessIssue] - its `self` is a protocol
    def generate(self, *args: Any, **options: Any) -> Any:
        # Either name of a cache works, whatever the installed transformers calls it.
        given = one_cache(options.pop("cache", None), options.pop("past_key_values", None))
        if given is not None:
            options[CACHE] = given
        return super().generate(*args, **options)  # pyright: ignore[reportAttributeAccessIssue] - see GenerationMixin

    def create_masks_for_generate(self, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """Leaves a mask as it is: the layers derive what they need from the positions."""
        return attention_mask

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> Any:
        kind = generation_config.cache_implementation
        wanted = model_kwargs.get(CACHE) is None and generation_config.use_cache is not False
        if not wanted or kind not in (None, "dynamic", "offloaded"):
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # pyright: ignore
        if kind == "offloaded" and self.device.type == "cpu":
            raise ValueError(
                "cache_implementation='offloaded' moves the cache of a GPU to RAM; the model is on the CPU."
            )
        chunks = self.text.chunk_sizes
        cache = new_cache(text_part(self.config), chunks=chunks, offloading=kind == "offloaded")
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE] = cache
