"""Patching whole regions of a picture, hook point by hook point: which part, and up to where, carries an answer."""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.hook_names import component_of, layer_of
from llama4lab.run.metrics import Metric, as_metric, evaluated
from llama4lab.run.pairing import Side, other_side, paired
from llama4lab.run.patching import patched
from llama4lab.run.recording import record
from llama4lab.run.selection import Selector, selected
from llama4lab.run.vision.regions import ImageRegion


def region_effects(
    model: HookedPreTrainedModel,
    clean: Any,
    corrupted: Any,
    regions: Mapping[str, ImageRegion],
    *,
    at: Selector,
    metric: Metric | Callable[[Tensor], Tensor],
    into: Side = "corrupted",
) -> pd.DataFrame:
    """Puts what one run has in a region into the other run, at each hook point in turn, and measures what changes.

    Unlike in a sweep over patches, all places of a region change together: patches in all tiles that show it, image
    tokens behind the pixel shuffle, positions in the text layers. Each line is a run of its own.

    Args:
        model: The model.
        clean: A prompt that the model answers as it should; anything that `model.prompt` takes.
        corrupted: Its counterpart, with pictures of the same sizes.
        regions: Name -> region of a picture, of either prompt. Their complements (`~region`) are regions too.
        at: Names or globs of hook points with places of images, in the vision tower or the text layers.
        metric: One of `lab.metrics`, or a function of the logits.
        into: Which run is patched, as in `lab.sweep`.

    Columns:
        region: name of the region.
        hook_point: the hook point.
        component: the hook point without its layer.
        layer: its layer, of the vision tower or the text layers; -1 for hook points outside layers.
        places: how many image patches, image tokens or positions were patched.
        patched: the metric under the patch, in the row of the region's image.
        clean, corrupted: of both runs without it.
        effect: `patched` minus the value of the run that was patched.
        normalised: `effect` as a share of the difference between the two runs; NaN where they do not differ.

    Raises:
        ValueError: if the prompts cannot be compared, a picture of the two lies otherwise on its tiles, or a hook point
            has no places of images.
    """
    pair, chosen = paired(model, clean, corrupted), as_metric(metric)
    base, names = pair.prompt(into), selected(model.hook_points(), at)
    source = record(model, pair.prompt(other_side(into)), at=names)
    values = {into: evaluated(chosen, record(model, base)), other_side(into): evaluated(chosen, source)}
    lines = []
    for title, given in regions.items():
        region = given.on(base)
        for name in names:
            with patched(model, region.values_from(source, name)):
                found = evaluated(chosen, record(model, base))[region.row]
            places = region.places_of(name, source.shapes[name])[0]
            line = {"region": title, "hook_point": name, "component": component_of(name)}
            line |= {"layer": -1 if (layer := layer_of(name)) is None else layer, "places": len(places)}
            line |= {"patched": float(found), "clean": float(values["clean"][region.row])}
            lines.append(line | {"corrupted": float(values["corrupted"][region.row])})
    table = pd.DataFrame(lines)
    start, goal = table[into], table[other_side(into)]
    table["effect"] = table["patched"] - start
    table["normalised"] = table["effect"] / (goal - start).where(goal != start)
    table.attrs = {"metric": chosen.name, "into": into}
    return table
