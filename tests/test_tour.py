"""The main job, as a user runs it."""

import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from llama4lab.cli import app


@pytest.fixture(scope="module")
def toured(tmp_path_factory):
    out = tmp_path_factory.mktemp("tour") / "page"
    result = CliRunner().invoke(app, ["tour", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out, result.output, (out / "index.html").read_text("utf-8")


def test_the_tour_prints_what_it_found(toured):
    _, printed, _ = toured
    for words in ("Next tokens", "' Mary'", "runner_up", "Share of the logit difference", "under each expert", "7/7"):
        assert words in printed, words


def test_the_page_needs_nothing_but_itself(toured):
    _, _, html = toured
    assert not re.search(r"(src|href)=['\"](?!data:image/png;base64,|#)", html)
    assert "<script" not in html


def test_every_figure_is_on_the_page_and_beside_it(toured):
    out, _, html = toured
    figures = sorted(path.name for path in out.glob("*.png"))
    assert figures == [
        *("attention_mass.png", "expert_load.png", "image_experts.png", "image_features.png", "patching.png"),
        "router_decisions.png",
    ]
    assert html.count("data:image/png;base64,") == len(figures)
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in figures)


def test_the_page_is_well_formed(toured):
    class Balance(HTMLParser):
        depth: list[str]

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "html"):
                self.depth.append(tag)

        def handle_endtag(self, tag):
            if tag != "html":
                assert self.depth.pop() == tag

    parser = Balance()
    parser.depth = []
    parser.feed(toured[2])
    assert not parser.depth


def test_what_the_tour_finds_is_true_of_the_tiny_checkpoint(toured):
    _, printed, _ = toured
    words = " ".join(printed.split())
    recalled, barred = re.search(
        r"with probability ([\d.]+)\. With the NoPE .*? probability is ([\d.]+)\.", words
    ).groups()  # pyright: ignore
    assert float(recalled) > 0.8 > 0.2 > float(barred)
    seen, blind = re.search(r"answers “red” with probability ([\d.]+); .*? probability is ([\d.]+)\.", words).groups()  # pyright: ignore
    assert float(seen) > 0.5 > float(blind)


def test_info_says_what_is_in_the_checkpoint_and_hooks_lists_its_places():
    info = CliRunner().invoke(app, ["info", "tiny"])
    assert info.exit_code == 0
    assert "routed experts" in info.output
    hooks = CliRunner().invoke(app, ["hooks", "tiny"])
    assert hooks.exit_code == 0
    assert "feed_forward.router.logits" in hooks.output
