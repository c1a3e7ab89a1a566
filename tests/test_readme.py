"""README says what is true."""

import re
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
UNLISTED = {"__pycache__", ".ruff_cache", ".ipynb_checkpoints"}


def block(language: str, number: int = 0) -> str:
    return re.findall(f"```{language}\n(.*?)```", README, re.DOTALL)[number]


def test_the_ten_line_example_runs(capsys):
    exec(compile(block("python"), "README.md", "exec"), {})
    plt.close("all")
    assert "prob_before" in capsys.readouterr().out


def test_the_patching_example_runs():
    names: dict = {}
    exec(compile(block("python", 1), "README.md", "exec"), names)
    plt.close("all")
    assert names["sweep"].complete


def test_the_routing_example_runs(capsys):
    names: dict = {}
    exec(compile(block("python", 2), "README.md", "exec"), names)
    plt.close("all")
    assert "regret" in capsys.readouterr().out
    assert names["stats"].groups == ["arithmetic", "code", "facts"]


def test_the_attention_example_runs(capsys):
    exec(compile(block("python", 3), "README.md", "exec"), {})
    plt.close("all")
    assert "accuracy" in capsys.readouterr().out


def test_the_image_example_points_at_the_square(capsys):
    exec(compile(block("python", 4), "README.md", "exec"), {})
    plt.close("all")
    assert "True" in capsys.readouterr().out


def test_the_checkpoint_example_runs(capsys):
    exec(compile(block("python", 5), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("all experts fit and are resident", "in order", "ExpertStore("))


def test_ci_runs_the_very_commands_of_readme():
    script = (ROOT / ".ci" / "run").read_text()
    for number in (0, 1):
        assert block("sh", number).strip() in script


def test_the_tree_names_every_file():
    listed, path = set(), []
    for line in block("text").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        path = [*path[:depth], name]
        assert len(line.split()) > 1 or name == "llama4lab/", f"{name} has no comment"
        if not name.endswith("/"):
            listed.add("".join(path))
    found = {
        str(file.relative_to(ROOT))
        for folder in ("llama4lab", "notebooks")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and not UNLISTED & set(file.parts)
    }
    packages = {f for f in found if f.endswith("/__init__.py") and f.count("/") > 1}
    assert listed == found - packages


def test_the_picture_exists():
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file()
