"""Who may know whom: the rules that keep the parts apart, read from the code's own imports."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("melcore", "gadgets", "training")
GROUND = {"melcore.layout", "melcore.errors", "melcore.data", "melcore.units"}
TORCH_ONLY = {"melcore.physics", "melcore.networks", "melcore.memory", "melcore.learning"}
# What the torch-only packages may import besides torch, the ground floor and themselves.
PLAIN = {
    *(
        "abc",
        "bisect",
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "enum",
        "functools",
        "gc",
        "inspect",
        "itertools",
    ),
    *("logging", "math", "operator", "time", "types", "typing", "warnings", "weakref"),
}
OPTIONAL = {"finufft", "cufinufft"}  # numeric libraries that the torch-only packages import inside functions
HEAVY = (
    "torch",
    "h5py",
    "ismrmrd",
    "gadgetron",
    "matplotlib",
    "pydantic",
    "tensorboard",
    "scipy",
    "skimage",
    "finufft",
)


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def belongs(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", modules(*PARTS), ids=name_of)
def test_imports_keep_to_the_house_rules(path: Path) -> None:
    name = name_of(path)
    found = set(imports(path))
    ours = {module for module in found if belongs(module, set(PARTS)) and module != "melcore"}
    if name in GROUND:
        assert all(belongs(module, GROUND) for module in ours), f"{name} is on the ground floor"
    home = ".".join(name.split(".")[:2])
    if home in TORCH_ONLY:
        allowed = {*PLAIN, "torch", *GROUND, home}
        optional = (found - set(imports(path, top_level_only=True))) & OPTIONAL
        strangers = {module for module in found - optional if not belongs(module, allowed) and module != "melcore"}
        assert not strangers, f"{name} may import torch and the ground floor only"
    forbidden = {"melcore": {"gadgets", "training"}, "gadgets": {"training"}, "training": {"gadgets"}}[
        name.split(".")[0]
    ]
    assert not {module for module in ours if belongs(module, forbidden)}, f"{name} must not know {forbidden}"


def is_command(path: Path) -> bool:
    return path.parent.name == "cli" or path.name.endswith("_command.py")


@pytest.mark.parametrize("path", [p for p in modules("melcore", "gadgets") if not is_command(p)], ids=name_of)
def test_library_is_silent(path: Path) -> None:
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "print" not in calls


@pytest.mark.parametrize("optional", ["matplotlib", "pydantic", "tensorboard", *sorted(OPTIONAL)])
@pytest.mark.parametrize("path", modules("melcore", "gadgets"), ids=name_of)
def test_optional_packages_are_imported_inside_functions(path: Path, optional: str) -> None:
    assert not belongs(optional, set(imports(path, top_level_only=True)))


def test_importing_melcore_loads_nothing_heavy() -> None:
    code = f"import sys, melcore, melcore.errors, melcore.cli, gadgets; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
