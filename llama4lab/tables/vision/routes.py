"""Which expert each place of a picture is sent to."""

# pandas declares what it gives as wide unions.
# pyright: reportReturnType=false

import pandas as pd

from llama4lab.run.run import Run
from llama4lab.tables.routing.choices import decisions
from llama4lab.tables.vision.recorded_places import recorded_places

KEY = ["row", "position"]


def experts(run: Run) -> pd.DataFrame:
    """Gives the experts of every image token, layer by layer.

    Args:
        run: A run with the routers recorded: `at="layers.*.feed_forward.router.*"`.

    Columns:
        row, image, tile, is_global, tile_row, tile_column, position, left, top, right, bottom: place of the image
            token, as in `tokens`.
        layer: layer of the router.
        slot: which of the token's choices, from 0.
        expert: the chosen expert.
        gate: factor on the expert's input, between 0 and 1.
        margin: lowest logit of the token's chosen experts minus the highest logit not chosen; see
            `lab.tables.routing.decisions`.

    Lines are in the order of the layers, in each in the order of the prompt. `attrs["num_experts"]` has the number of
    experts.

    Raises:
        KeyError: if router logits or indices were not recorded.
        ValueError: if the run has no image token.
    """
    places = recorded_places(run).drop(columns=["batch_index", "seq_index"])
    chosen = decisions(run)
    lines = chosen[[*KEY, "layer", "slot", "expert", "gate", "margin"]]
    order = places.assign(order=range(len(places)))
    table = order.merge(lines, on=KEY, how="inner", validate="one_to_many")
    table = table.sort_values(["layer", "order", "slot"], ignore_index=True).drop(columns="order")
    table.attrs = {"num_experts": chosen.attrs["num_experts"]}
    return table
