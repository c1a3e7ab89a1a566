"""Every line of an occlusion is what the model makes of a picture that was really painted over."""

# pandas declares what it gives as wide unions.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false

import numpy as np
import pytest
import torch
from PIL import Image

import llama4lab as lab
from llama4lab.run.metrics import evaluated
from llama4lab.run.vision.covered_pictures import sliding_boxes
from llama4lab.tables.vision import occlusion


@pytest.fixture(scope="module")
def tiny() -> lab.HookedLlama4:
    model = lab.load()
    assert isinstance(model, lab.HookedLlama4)
    return model


def noise(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def painted(picture: Image.Image, line, colour: tuple[int, int, int]) -> Image.Image:
    pixels = np.array(picture)
    pixels[int(line.top) : int(line.bottom), int(line.left) : int(line.right)] = colour
    return Image.fromarray(pixels)


def test_boxes_go_over_the_whole_picture_and_never_leave_it():
    for height, width, side, step in [(48, 48, 16, 4), (50, 31, 16, 5), (9, 100, 9, 4), (7, 7, 3, 10)]:
        seen = np.zeros((height, width), dtype=int)
        boxes = sliding_boxes((height, width), side, step)
        assert len(set(boxes)) == len(boxes)
        for left, top, right, bottom in boxes:
            assert (right - left, bottom - top) == (side, side)
            assert left >= 0
            assert top >= 0
            seen[top:bottom, left:right] += 1
            assert right <= width
            assert bottom <= height
        assert seen[[0, 0, -1, -1], [0, -1, 0, -1]].all()
        assert step > side or seen.all()


@pytest.mark.parametrize("normalize", ["hf", "meta"])
@pytest.mark.parametrize("kind", ["by row", "of the whole batch"])
def test_lines_equal_runs_with_pictures_painted_by_hand(tiny, normalize, kind):
    """The second picture of the second row, of several tiles; the first row is padded."""
    metric = {"by row": lab.metrics.log_prob([" red", "red"]), "of the whole batch": _largest}[kind]
    pictures = [[noise(48, 48, 0)], [noise(48, 48, 1), noise(60, 90, 2)]]
    texts = ["<|image|> What is it?", "<|image|> and <|image|> differ, do they not?"]

    def asked(last: Image.Image) -> lab.Prompt:
        return tiny.prompt(texts, images=[pictures[0], [pictures[1][0], last]], normalize=normalize)

    prompt = asked(pictures[1][1])
    table = occlusion(tiny, prompt, metric=metric, size=40, step=25, image=2, color=(255, 0, 9), progress=False)
    assert len(table) == 2 * 3
    assert table["base"].tolist() == pytest.approx([float(evaluated(metric, lab.record(tiny, prompt))[1])] * 6)
    for line in table.itertuples():
        expected = evaluated(metric, lab.record(tiny, asked(painted(pictures[1][1], line, (255, 0, 9)))))
        assert line.patched == pytest.approx(float(expected[1]), abs=1e-4)
        assert line.effect == pytest.approx(line.patched - line.base)
        assert (line.row, line.image) == (1, 2)


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """Mixes all rows: each is compared with the mean of them."""
    last = logits[:, -1].float()
    return last.amax(-1) - last.mean()


def test_a_box_of_the_colour_of_the_picture_hides_nothing(tiny):
    picture = Image.new("RGB", (48, 48), (30, 60, 90))
    prompt = tiny.prompt("<|image|> What is it?", images=picture)
    table = occlusion(tiny, prompt, metric=lab.metrics.log_prob(" red"), progress=False)
    assert table["effect"].abs().max() < 1e-4
    assert (table["right"] - table["left"]).unique().tolist() == [16]
    assert np.diff(sorted(table["left"].unique())).tolist() == [4] * 8


def test_boxes_are_filled_with_the_mean_of_the_picture(tiny):
    picture, metric = noise(48, 48, 0), lab.metrics.log_prob(" red")
    prompt = tiny.prompt("<|image|> What is it?", images=picture)
    mean = tuple(np.asarray(picture).reshape(-1, 3).mean(0).round().astype(int).tolist())
    pairs = [occlusion(tiny, prompt, metric=metric, color=color, size=24, progress=False) for color in (None, mean)]
    assert pairs[0].equals(pairs[1])


def test_a_patched_model_is_measured_as_it_is_patched(tiny):
    picture, metric = noise(48, 48, 0), lab.metrics.log_prob(" red")
    prompt = tiny.prompt("<|image|> What is it?", images=picture)
    features = lab.record(tiny, prompt, at="image_features")["image_features"]
    with lab.patched(tiny, {"image_features": features}):
        table = occlusion(tiny, prompt, metric=metric, size=24, step=24, progress=False)
    assert table["effect"].abs().max() < 1e-4  # the vision tower is cut off
    assert occlusion(tiny, prompt, metric=metric, size=24, step=24, progress=False)["effect"].abs().max() > 1e-2


def test_pixel_values_of_another_making_are_refused(tiny):
    prompt = tiny.prompt("<|image|> What is it?", images=noise(48, 48, 0))
    assert prompt.pixel_values is not None
    prompt.pixel_values = prompt.pixel_values * 0.5
    with pytest.raises(ValueError, match="does not make the pixel values"):
        occlusion(tiny, prompt, metric=lab.metrics.log_prob(" red"), progress=False)


def test_impossible_boxes_and_pictures_are_refused(tiny):
    prompt, metric = tiny.prompt("<|image|> What is it?", images=noise(30, 48, 0)), lab.metrics.log_prob(" red")
    for size, step in ((31, 4), (0, 4), (10, 0)):
        with pytest.raises(ValueError, match="48 pixels wide and 30 high"):
            occlusion(tiny, prompt, metric=metric, size=size, step=step, progress=False)
    with pytest.raises(ValueError, match="0 to 255"):
        occlusion(tiny, prompt, metric=metric, color=(0, 0, 256), progress=False)
    with pytest.raises(IndexError, match="has 1 images"):
        occlusion(tiny, prompt, metric=metric, image=1, progress=False)
    prompt.images[0].original = None
    with pytest.raises(ValueError, match="no picture"):
        occlusion(tiny, prompt, metric=metric, progress=False)
