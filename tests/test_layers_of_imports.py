"""A file of `kfac_fx` imports lower layers only, and torch's private modules stay behind three files.

A room is a file or a folder of `kfac_fx`; the files of one folder are one room.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "kfac_fx"

# Lowest first. Rooms of one row never import each other.
LAYERS = (
    ("errors", "layout", "host", "precision", "wording", "contents"),
    ("types", "stages", "outfile", "boxes", "untouched"),
    ("traced", "sources", "estimates"),
    ("contracts", "graph", "linalg", "gram", "loss", "forms"),
    ("editing", "planned", "windows", "shifts"),
    (
        "walk",
        "traces",
        "canonical",
        "batch",
        "hessian",
        "rows",
        "lags",
        "newton",
        "woodbury",
        "spectrum",
        "loss_info",
    ),
    ("autocorrelation", "squares", "splice", "schedule", "outcomes", "watch"),
    ("passes", "layers", "methods"),
    ("record", "align", "assemble", "uses"),
    ("capture", "match"),
    ("plan", "functions", "forward", "writer", "places"),
    ("trace", "draft", "curvature", "guards", "quadratic", "levenberg", "stacking"),
    ("collect", "eager", "directions"),
    ("instrument", "lower", "check", "pending", "adaptive", "optimizer"),
    ("compiled", "progress"),
    ("captures",),
    ("live",),
    ("step",),
    ("__init__",),
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}

# Side rooms: the highest layer they may read, and the rooms that may read them.
SIDE = {
    "report": "plan",
    "target": "types",
    "bench": "__init__",
    "export": "__init__",
    "spectra": "__init__",
    "verification": "step",
}
SIDE_READERS = {
    "report": {"trace", "bench", "export", "live", "verification"},
    "target": {"export", "spectra"},
    "bench": set(),
    "export": set(),
    "spectra": set(),
    "verification": set(),
}

READS_TORCH_INTERNALS = {"capture", "graph", "lower"}
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def module_of(file: Path) -> str:
    """`kfac_fx/layers/conv.py` -> `kfac_fx.layers.conv`; a package is named by its folder."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The file or folder of `kfac_fx` that `module` belongs to; `__init__` for the top."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(source: str, *, module: str, is_package: bool = False) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every import statement anywhere in `source`: the absolute module and the names taken from it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            yield ".".join([*base, *filter(None, [node.module])]), tuple(alias.name for alias in node.names)


def rooms_read(source: str, *, module: str, is_package: bool = False) -> set[str]:
    """Rooms of `kfac_fx`, other than the module's own, that `source` imports."""
    rooms = set()
    for name, taken in imported(source, module=module, is_package=is_package):
        if name == PACKAGE:
            rooms |= {
                taken_name if taken_name in RANK.keys() | SIDE.keys() else "__init__" for taken_name in taken
            }
            rooms |= set() if taken else {"__init__"}
        elif name.startswith(f"{PACKAGE}."):
            rooms.add(room_of(name))
    return rooms - {room_of(module)}


def may_read(room: str, other: str) -> bool:
    """Whether a file in `room` may import `other`."""
    if room == "__init__":
        return True
    if other in SIDE:
        return room in SIDE_READERS[other]
    return other in RANK and (RANK[other] <= RANK[SIDE[room]] if room in SIDE else RANK[other] < RANK[room])


def torch_internals(source: str, *, module: str) -> set[str]:
    """Private names of torch that `source` imports or reaches through attributes, operators excepted."""
    names = set()
    for name, taken in imported(source, module=module):
        names |= {f"{name}.{part}" for part in taken} if taken else {name}
    tree = ast.parse(source)
    names |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in names if is_torch_internal(name)}


def is_torch_internal(name: str) -> bool:
    """`torch._C`, `torch.utils._pytree`, `torch.fx.experimental`; not `torch.ops.aten._grouped_mm`."""
    if not name.startswith("torch.") or name.startswith("torch.ops."):
        return False
    private = any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
    return private or name.startswith("torch.fx.experimental")


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_a_file_imports_lower_layers_only(file: Path) -> None:
    module, is_package = module_of(file), file.name == "__init__.py"
    room = room_of(module)
    assert room in RANK or room in SIDE, f"{module} has no place in the table of layers"
    read = rooms_read(file.read_text(), module=module, is_package=is_package)
    assert {other for other in read if not may_read(room, other)} == set()


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_torch_internals_stay_behind_three_files(file: Path) -> None:
    module = module_of(file)
    private = torch_internals(file.read_text(), module=module)
    assert private == set() or room_of(module) in READS_TORCH_INTERNALS


@pytest.mark.parametrize("folder", sorted({file.parent for file in FILES}), ids=module_of)
def test_every_folder_is_an_installed_package(folder: Path) -> None:
    assert (folder / "__init__.py").exists()
    assert f'"{module_of(folder)}"' in (ROOT / "pyproject.toml").read_text()


def test_the_command_line_has_no_private_access_to_torch() -> None:
    for file in sorted((ROOT / "cli").rglob("*.py")):
        assert torch_internals(file.read_text(), module=module_of(file)) == set()


@pytest.mark.parametrize(
    ("statement", "room"),
    [
        ("import kfac_fx.plan", "plan"),
        ("import kfac_fx", "__init__"),
        ("from kfac_fx import compile", "__init__"),
        ("from kfac_fx import plan", "plan"),
        ("from kfac_fx.methods.kfac import KFAC", "methods"),
        ("from ..methods import kfac", "methods"),
        ("from .. import plan", "plan"),
        ("def late():\n    from kfac_fx.report import text", "report"),
    ],
)
def test_a_forbidden_import_is_seen_in_every_spelling(statement: str, room: str) -> None:
    assert rooms_read(statement, module="kfac_fx.layers.linear") == {room}
    assert not may_read("layers", room)


@pytest.mark.parametrize(
    "statement", ["import torch", "from kfac_fx.layers import conv", "from . import conv"]
)
def test_the_own_folder_and_other_packages_are_not_rooms(statement: str) -> None:
    assert rooms_read(statement, module="kfac_fx.layers.linear") == set()


def test_a_relative_import_of_a_package_starts_at_the_package() -> None:
    assert rooms_read("from .conv import Conv", module="kfac_fx.layers", is_package=True) == set()
    assert rooms_read("from .plan import Plan", module="kfac_fx", is_package=True) == {"plan"}


@pytest.mark.parametrize(
    "statement",
    [
        "import torch._dynamo",
        "from torch import _dynamo",
        "from torch.utils import _pytree as pytree",
        "from torch.utils._pytree import tree_map",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "from torch.fx import experimental",
        "import torch\ntorch._C._get_tracing_state()",
    ],
)
def test_torch_internals_are_seen_in_every_spelling(statement: str) -> None:
    assert torch_internals(statement, module="kfac_fx.plan")


@pytest.mark.parametrize(
    "statement",
    [
        "from torch.fx import Node",
        "import torch\ntorch.ops.aten._grouped_mm",
        "import torch\ntorch.__version__",
    ],
)
def test_public_torch_is_not_internal(statement: str) -> None:
    assert torch_internals(statement, module="kfac_fx.plan") == set()
