"""The import law: a folder imports only from folders to its left, and no cycle exists inside a folder."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llama4lab"
ROAD = ["checkpoint", "model", "prompt", "run", "tables", "viz", "widgets"]
FREE = {"__init__", "__main__", "cli", "tour", "page"}  # at the top; these may import everything
BARRED = {"viz": "torch", "tables": "matplotlib"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports, wherever in the file, without the package's own name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def folder(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_leftwards(path: Path):
    own = folder(path)
    if own in FREE:
        return
    reach = {"tiny", *ROAD[: ROAD.index("tables")]} if own == "tiny" else set(ROAD[: ROAD.index(own) + 1])
    for name in imported(path):
        root, _, rest = name.partition(".")
        assert root != BARRED.get(own), f"{path} imports {name}"
        if root == "llama4lab":
            assert rest.split(".")[0] in reach, f"{path} imports {name}, which is not to its left"
        assert own != "checkpoint" or not name.startswith("torch.nn"), f"{path} imports {name}"


@pytest.mark.parametrize("own", [*ROAD, "tiny"])
def test_a_folder_has_no_import_cycle(own: str):
    modules = {
        f"llama4lab.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}": path
        for path in FILES
        if folder(path) == own
    }
    names = {module: imported(path) for module, path in modules.items()}
    graph = {
        module: {other for other in modules if any(name == other or name.startswith(f"{other}.") for name in own)}
        for module, own in names.items()
    }
    graph = {module: others - {module} for module, others in graph.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_file_is_longer_than_300_lines_and_no_function_longer_than_60():
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 300, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node)
                length = node.end_lineno - node.lineno - (documented or "").count("\n")  # pyright: ignore
                assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines without its docstring"


def test_no_file_is_named_for_nothing():
    vague = {"utils", "helpers", "common", "misc", "base", "core", "types", "tools"}
    assert not [path for path in FILES if path.stem in vague]
