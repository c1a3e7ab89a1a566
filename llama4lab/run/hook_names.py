"""What the name of a hook point says: its layer, what it is in the layer, and its neighbours."""


def layer_of(name: str) -> int | None:
    """The layer in the name of a hook point, of the vision tower too; None for those of the whole model."""
    _, found, rest = name.partition("layers.")
    return int(rest.partition(".")[0]) if found else None


def component_of(name: str) -> str:
    """The name of a hook point without its layer."""
    head, found, rest = name.partition("layers.")
    return head + rest.partition(".")[2] if found else name


def beside(name: str, component: str) -> str:
    """Another hook point of the same layer, of the vision tower if the first one is there."""
    head, _, rest = name.partition("layers.")
    return f"{head}layers.{rest.partition('.')[0]}.{component}"


def router_of(name: str) -> str:
    """The experts that the tokens at a hook point of `experts` are sent to: the indices of the layer's router."""
    return beside(name, "feed_forward.router.indices")


def is_vision(name: str) -> bool:
    """Whether a hook point belongs to the vision tower or the projector behind it."""
    return name.startswith("vision_model.") or name == "image_features"


def is_pattern(name: str) -> bool:
    """Whether a hook point has a number for each query and key."""
    return name.endswith((".scores", ".pattern"))
