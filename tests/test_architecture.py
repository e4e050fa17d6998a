"""Imports point down only, and `__init__.py` files are empty."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megavlm"

# From the ground up; a package imports only from lower levels, and from its own.
LEVELS = [
    {"redact"},
    {"terminal"},
    {"errors"},
    {"config", "files", "ops"},
    {"dist"},
    {"data"},
    {"model"},
    {"stages", "checkpoint", "planner"},
    {"engine", "infer"},
    {"train", "convert", "dryrun", "filters", "serve"},
    {"eval"},
    {"commands"},
    {"__main__"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path.name == "__init__.py":
        assert path.read_text() == ""
        return
    part = part_of(path)
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            names = module.split(".")
            if names[0] != "megavlm":
                continue
            assert names[1] == part or LEVEL_OF[names[1]] < LEVEL_OF[part], (
                f"{part} must not import megavlm.{names[1]}"
            )
