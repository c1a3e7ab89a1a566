"""What the text model and the multimodal model share: their place among transformers' models."""

from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, Llama4Config, Llama4TextConfig, PreTrainedModel
from transformers import initialization as init

from llama4lab.checkpoint.replacement import replacement
from llama4lab.checkpoint.settings import FILE
from llama4lab.model.cache import new_cache
from llama4lab.model.config_parts import text_part
from llama4lab.model.expert_store import ExpertStore
from llama4lab.model.experts import Experts
from llama4lab.model.hook_points import HookPoints, hook_points
from llama4lab.model.output import CACHE, one_cache
from llama4lab.model.packed_weights import packed_of
from llama4lab.model.promptable import Promptable
from llama4lab.model.saving import check_options, check_target, write_config, write_packed
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
        """Writes a checkpoint, in the form of transformers, that loads as this model again.

        A model of numbers is written as transformers writes it. One whose weights are packed is written packed: what
        was rounded by `load(quantize=...)` in the form of compressed-tensors, and what was packed in its checkpoint as
        it is stored there. What waits on disk is copied from its files. Both give the same bits when they are
        loaded, and other tools can load them. Weights packed in ways that safetensors checkpoints do not have (those of
        GGUF and of Meta's files) are written as numbers, in the dtype of the model. No file is ever whole in memory.

        The new files take the place of older ones when all are written; an interruption leaves the folder as it was.
        Tokenizer and image processor are not written, as in transformers: copy their files, for prompts of text.

        Args:
            save_directory: The folder; not the one that weights of this model wait in.
            options: Those of transformers' `save_pretrained`. Packed models take `max_shard_size` ("50GB" if it is not
                given) and `is_main_process`; with `state_dict=model.state_dict()` they are written as numbers.

        Raises:
            TypeError: if there is no such option.
            ValueError: if an option cannot be honoured, or if the checkpoint that the model was loaded from is needed
                and holds other weights by now.
            FileNotFoundError: if that is needed and gone.
        """
        folder, main = Path(save_directory), options.get("is_main_process", True)
        adapters = getattr(self, "_hf_peft_config_loaded", False)
        packed = options.get("state_dict") is None and not adapters and bool(packed_of(self))
        check_options(options, packed=packed)
        options.pop("safe_serialization", None)
        if options.get("state_dict") is not None:
            options["state_dict"] = dict(options["state_dict"])  # transformers empties the one that it is given
        if packed and not main:
            return
        check_target(self, folder)
        if not main or options.get("push_to_hub") or options.get("distributed_checkpoint"):
            super().save_pretrained(folder, **options)
            if main:
                write_config(self, folder)
            return
        with replacement(folder) as fresh:
            if packed:
                write_packed(self, fresh, options.get("max_shard_size", "50GB"))
                return
            super().save_pretrained(fresh, **options)
            if (fresh / FILE).is_file():
                write_config(self, fresh)

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
