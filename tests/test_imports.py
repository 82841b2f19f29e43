"""The order of the rooms: imports run down the list, and never in a circle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "captioner"

ROOMS = [
    "__main__",
    "cli",
    "options",
    "commands",
    "recipes",
    "serving",
    "tagging",
    "training pretraining",
    "evaluation",
    "report",
    "metrics",
    "transformers_auto",
    "inference",
    "search",
    "image_tags",
    "loading",
    "data",
    "modeling",
    "configuration text_decoder generation",
    "fusion tag_head",
    "processing",
    "labels",
    "encoders",
    "runs",
    "tags",
    "images grids hub transformers_versions text_files",
    "errors",
]
"""From top to bottom. What stands in one line shares a level: of two folders there, neither imports the other."""

LEVELS = {name: level for level, names in enumerate(ROOMS) for name in names.split()}


def modules() -> dict[str, Path]:
    """Name each file of the package, without the package's own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:  # the package's own file names what lies everywhere, lazily
            found[name] = path
    return found


MODULES = modules()


def imports(path: Path, hidden: bool) -> set[str]:
    """Return the modules of the package that a file imports, also those within functions if `hidden`."""
    tree = ast.parse(path.read_text())
    within = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in within and not hidden:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "captioner":
            module = node.module.removeprefix("captioner").lstrip(".")
            found |= {full if (full := f"{module}.{a.name}".lstrip(".")) in MODULES else module for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("captioner.") for a in node.names if a.name.startswith("captioner.")}
    return found - {""}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_down(name):
    room = name.split(".")[0]
    for other in imports(MODULES[name], hidden=True):
        below = other.split(".")[0]
        if below != room:
            assert LEVELS[room] < LEVELS[below], f"{name} imports {other}, which stands above it or beside it"


def test_no_imports_in_a_circle():
    graph = {name: imports(path, hidden=False) & MODULES.keys() for name, path in MODULES.items()}
    for name in graph:  # a package is imported before its modules
        if "." in name:
            graph[name] |= (
                {name.rpartition(".")[0]} if name.rpartition(".")[0] in imports(MODULES[name], False) else set()
            )
    while graph:
        leaves = {name for name, below in graph.items() if not below & graph.keys() - {name}}
        assert leaves, f"imports in a circle among {sorted(graph)}"
        graph = {name: below for name, below in graph.items() if name not in leaves}


@pytest.mark.parametrize("name", MODULES)
def test_an_import_within_a_function_is_for_the_start_alone(name):
    """Only commands, which must answer `--help` and a wrong option at once, import parts of ours when they run."""
    hidden = imports(MODULES[name], hidden=True) - imports(MODULES[name], hidden=False)
    assert not hidden or name.split(".")[0] in ("commands", "cli"), f"{name} hides imports of {sorted(hidden)}"
