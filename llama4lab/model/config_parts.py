"""The parts of transformers' config with their types narrowed to what a Llama 4 has."""

from transformers import Llama4Config, Llama4TextConfig, Llama4VisionConfig, PreTrainedConfig


def text_part(config: PreTrainedConfig) -> Llama4TextConfig:
    """The settings of the text model."""
    part = config.get_text_config()
    if not isinstance(part, Llama4TextConfig):
        raise TypeError(f"The text model needs a Llama4TextConfig, not a {type(part).__name__}.")
    return part


def vision_part(config: Llama4Config) -> Llama4VisionConfig:
    """The settings of the vision tower."""
    part = config.vision_config
    if not isinstance(part, Llama4VisionConfig):
        raise TypeError(f"The vision tower needs a Llama4VisionConfig, not a {type(part).__name__}.")
    return part


def tile_side(config: Llama4VisionConfig) -> int:
    """Side of a tile in pixels; tiles and patches are squares."""
    return _square("image_size", config.image_size)


def patch_side(config: Llama4VisionConfig) -> int:
    """Side of a patch in pixels."""
    return _square("patch_size", config.patch_size)


def _square(name: str, size: int | list[int] | tuple[int, int]) -> int:
    if not isinstance(size, int):
        raise ValueError(f"vision_config.{name} is {size}; Llama 4 has square tiles and patches, given as one number.")
    return size
