"""`train_step.py`: the exported step runs without the library and equals `kfac_fx.compile` bit for bit."""

import ast
import copy
import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.errors import ExportError
from kfac_fx.export.subject import Subject
from kfac_fx.export.train_step import export_train_step, train_step
from kfac_fx.target import Target

STEPS = 10
SCHEDULE: dict[str, Any] = {"statistics_every": 2, "inverse_every": 4}
ROUNDED: dict[str, Any] = {**SCHEDULE, "statistics_precision": "bfloat16"}
RUN = """
import importlib.util, pathlib, sys
import torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kfac_fx":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
torch.set_num_threads(int(sys.argv[1]))
for folder in map(pathlib.Path, sys.argv[2:]):
    spec = importlib.util.spec_from_file_location("step_of_" + folder.name, folder / "train_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = torch.load(folder / "expected.pt", weights_only=True)
    state = module.initial_state()
    torch.manual_seed(1)
    losses = [module.step(state, inputs, targets) for inputs, targets in expected["batches"]]
    differing = [f"loss {i}" for i, l in enumerate(losses) if not torch.equal(l, expected["losses"][i])]
    for kind in ("parameters", "buffers"):
        assert state[kind].keys() == expected[kind].keys(), (folder, kind)
        differing += [n for n, t in state[kind].items() if not torch.equal(t, expected[kind][n])]
    for key, tensors in expected["curvature"].items():
        own = state["curvature"][key]
        differing += [f"{n} of {key}" for n, t in own.items() if not torch.equal(t, tensors[n])]
    print(folder.name, state["counts"], differing or "equal")
"""


class Pixels(nn.Module):
    """Convolutions with and without groups, batch norms, dropout, one frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, bias=False)
        self.depthwise = nn.Conv2d(4, 4, 2, groups=4)
        self.frozen = nn.Linear(8, 6).requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(images)))
        x = self.depthwise(F.relu(self.grouped(x)))
        return self.head(torch.tanh(self.frozen(F.dropout(x.flatten(1), 0.1, self.training))))


class Words(nn.Module):
    """Embedding tied to the head, three readers of one input, layer norm, a parameter in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("mask", torch.ones(4, 4).tril())
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, options: dict[str, Any]) -> Tensor:
        x = self.norm(self.embed(tokens))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        scores = self.q(x) @ self.k(x).mT * self.scale + options["shift"]
        scores = scores.masked_fill(self.mask == 0, -torch.inf)
        return self.head(x + scores.softmax(-1) @ self.v(x))


def pixels() -> Target:
    torch.manual_seed(0)
    inputs, targets = torch.randn(6, 2, 5, 4), torch.randint(0, 3, (6,))
    return Target(model=Pixels(), loss_fn=F.cross_entropy, inputs=inputs, targets=targets, label="pixels.py")


def words() -> Target:
    torch.manual_seed(0)
    inputs = {"tokens": torch.randint(0, 7, (3, 4)), "options": {"shift": torch.randn(3, 4, 4), "n": 2}}
    targets = (torch.randint(0, 7, (3, 4)), 0.5)

    def loss_fn(logits: Tensor, targets: tuple[Tensor, float]) -> Tensor:
        return targets[1] * F.cross_entropy(logits.flatten(0, 1), targets[0].flatten(), ignore_index=3)

    return Target(model=Words(), loss_fn=loss_fn, inputs=inputs, targets=targets, label="words.py")


def varied(value: Any, number: int) -> Any:
    """The same batch in another order and, where it is of floating point, of another size."""
    if isinstance(value, dict):
        return {key: varied(item, number) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(varied(item, number) for item in value)
    if not isinstance(value, Tensor):
        return value
    rolled = value.roll(number, 0)
    return rolled * (1 + 0.1 * number) if value.is_floating_point() else rolled


def exported(folder: Path, target: Target, method: Any, **options: Any) -> None:
    """The files of an exported step, and what `kfac_fx.compile` does in `STEPS` steps."""
    model = copy.deepcopy(target.model)
    step = kfac_fx.compile(model, target.loss_fn, method=method, backend="eager", **options)
    batches = [(varied(target.inputs, n), varied(target.targets, n)) for n in range(STEPS)]
    torch.manual_seed(1)
    losses = [step(*batch) for batch in batches]
    expected = {
        "batches": batches,
        "losses": losses,
        "parameters": {name: p.detach() for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
        "curvature": step.state_dict()["curvature"],
    }
    folder.mkdir()
    torch.save(expected, folder / "expected.pt")
    for name, content in export_train_step(step.plan, target).items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def loaded(folder: Path) -> Any:
    """An exported file as a module."""
    spec = importlib.util.spec_from_file_location(f"step_of_{folder.name}", folder / "train_step.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_without_library(*arguments: str | Path, cwd: Path) -> list[str]:
    """Lines that a Python without `kfac_fx` prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


Case = tuple[Callable[[], Target], Any, dict[str, Any]]
CASES: dict[str, Case] = {
    "kfac": (pixels, kfac_fx.KFAC(**SCHEDULE), {"fisher": "mc"}),
    "kfc": (pixels, kfac_fx.KFC(spatially_uncorrelated_activations=True, **ROUNDED), {}),
    "ekfac": (pixels, kfac_fx.EKFAC(**SCHEDULE), {}),
    "diagonal": (pixels, kfac_fx.Diagonal(statistics_every=3), {}),
    "singd": (pixels, kfac_fx.SINGD(statistics_every=2), {}),
    "nkfac": (pixels, kfac_fx.NKFAC(statistics_every=1, inverse_every=2), {}),
    "skfac": (pixels, kfac_fx.SKFAC(strategy="subsample", positions=2, window=2, **SCHEDULE), {}),
    "kfac_on_words": (words, kfac_fx.KFAC(damping_rule="tikhonov", **SCHEDULE), {}),
    "foof": (words, kfac_fx.FOOF(**ROUNDED), {}),
    "ikfac": (words, kfac_fx.IKFAC(statistics_every=3), {}),
    "adankfac": (words, kfac_fx.AdaNKFAC(statistics_every=2, inverse_every=2), {}),
    "skfac_on_words": (words, kfac_fx.SKFAC(**SCHEDULE), {"sharing": "reduce"}),
    "ekfac_on_words": (words, kfac_fx.EKFAC(**SCHEDULE), {"fisher": "type2", "exclude": ("q.*",)}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All cases, exported."""
    root = tmp_path_factory.mktemp("exported")
    for name, (target, method, options) in CASES.items():
        exported(root / name, target(), method, **options)
    yield root


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, str]:
    """What each case came to, where the library cannot be imported: in one process."""
    script = folder / "run.py"
    script.write_text(RUN)
    threads = str(torch.get_num_threads())
    lines = run_without_library("-I", script, threads, *(folder / name for name in CASES), cwd=folder)
    return dict(line.split(" ", 1) for line in lines)


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_give_the_same_losses_weights_and_factors_bit_for_bit(
    outcomes: dict[str, str], name: str
) -> None:
    assert outcomes[name].endswith(" equal"), outcomes[name]


def test_every_method_is_among_the_cases() -> None:
    assert {method.name for _, method, _ in CASES.values()} == set(kfac_fx.methods())


def test_the_file_runs_as_a_script_from_any_folder(folder: Path, tmp_path: Path) -> None:
    lines = run_without_library("-I", folder / "kfac_on_words" / "train_step.py", cwd=tmp_path)
    assert [line.split(":")[0] for line in lines] == [f"step {number}" for number in range(1, 6)]


@pytest.mark.parametrize("name", CASES)
def test_the_file_imports_torch_and_the_standard_library_alone(folder: Path, name: str) -> None:
    tree = ast.parse((folder / name / "train_step.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in imported}
    assert "torch" in roots and roots - {"torch"} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", CASES)
def test_each_layer_names_the_line_that_computes_its_factors(folder: Path, name: str) -> None:
    lines = (folder / name / "train_step.py").read_text().split("\n")
    named = [found for line in lines if (found := re.match(r"# \w+.*; line (\d+), (\w+)$", line))]
    assert len(named) >= 3
    for found in named:
        assert lines[int(found[1]) - 1].strip().startswith(f"{found[2]} = "), found[0]


def test_a_loss_that_is_not_finite_raises_and_changes_nothing(folder: Path) -> None:
    module = loaded(folder / "ekfac")
    state = module.initial_state()
    inputs, targets = module.random_batch()
    module.step(state, inputs, targets)
    before = copy.deepcopy({name: state[name] for name in ("step", "parameters", "buffers", "curvature")})
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        module.step(state, torch.full_like(inputs, torch.nan), targets)
    assert state["step"] == before["step"] == 1
    for kind in ("parameters", "buffers"):
        assert all(torch.equal(state[kind][name], old) for name, old in before[kind].items())
    for key, tensors in before["curvature"].items():
        assert all(torch.equal(state["curvature"][key][name], old) for name, old in tensors.items())


def test_a_batch_of_another_shape_is_refused_by_name(folder: Path) -> None:
    module = loaded(folder / "ekfac")
    inputs, targets = module.random_batch()
    with pytest.raises(ValueError, match=r"inputs is \[3, 2, 5, 4\].* for \[6, 2, 5, 4\]"):
        module.step(module.initial_state(), inputs[:3], targets[:3])
    with pytest.raises(ValueError, match=r"inputs is a tuple, not a tensor of \[6, 2, 5, 4\]"):
        module.step(module.initial_state(), (inputs,), targets)


def test_a_method_with_the_quadratic_model_is_refused_and_the_file_says_why() -> None:
    torch.manual_seed(0)
    target = Target(
        model=nn.Linear(2, 1),
        loss_fn=F.mse_loss,
        inputs=torch.randn(4, 2),
        targets=torch.randn(4, 1),
        label="",
    )
    method = kfac_fx.KFAC(quadratic_model=True)
    plan = kfac_fx.inspect(target.model, target.loss_fn, target.inputs, target.targets, method=method)
    with pytest.raises(ExportError, match="quadratic_model=False"):
        export_train_step(plan, target)
    with pytest.warns(UserWarning, match="quadratic_model=False"):
        files = train_step(Subject(plan=plan, target=target))
    with pytest.raises(SystemExit, match="quadratic_model=False"):
        exec(files["train_step.py"], {})


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor, options: dict[str, float]) -> Tensor:
        return self.layer(x).clamp(options["least"], options["most"])


def test_numbers_of_the_batch_that_are_not_finite_are_written_and_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(4, 2), "options": {"least": -math.inf, "most": math.inf, "unused": math.nan}}
    model, targets = Clipped(), torch.randn(4, 1)
    plan = kfac_fx.inspect(model, F.mse_loss, inputs, targets)
    target = Target(model=model, loss_fn=F.mse_loss, inputs=inputs, targets=targets, label="")
    (tmp_path / "train_step.py").write_text(str(export_train_step(plan, target)["train_step.py"]))
    module = loaded(tmp_path)
    assert {**module.random_batch()[0]["options"], "unused": 0} == {**inputs["options"], "unused": 0}
    assert [tensor is inputs["x"] for tensor in module.tensors_of(inputs, targets).values()][0]
    for name in ("least", "most", "unused"):
        other = {**inputs, "options": {**inputs["options"], name: 0.5}}
        with pytest.raises(ValueError, match=rf'made with inputs\["options"\]\["{name}"\] = -?(inf|nan)'):
            module.tensors_of(other, targets)


AWKWARD = ("plain", "é漢", "ö", "a\nb", "back\\", 'three"""', 'end"', "a_b", "mapping", "none", "valueError")


class Awkward(nn.Module):
    """Weights whose names end a comment or a docstring, are not ASCII, or are alike as variables."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Module()
        self.a.b = nn.Parameter(torch.randn(2, 2))
        for name in AWKWARD:
            self.register_parameter(name, nn.Parameter(torch.randn(2, 2)))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.a.b
        for name in AWKWARD:
            x = torch.tanh(x @ self._parameters[name])
        return x


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported step of a model with awkward names; its label is awkward as well."""
    torch.manual_seed(0)
    model, inputs, targets = Awkward(), torch.randn(5, 2), torch.randn(5, 2)
    plan = kfac_fx.inspect(model, F.mse_loss, inputs, targets)
    label = 'a\\ b"""\n.py"'
    target = Target(model=model, loss_fn=F.mse_loss, inputs=inputs, targets=targets, label=label)
    folder = tmp_path_factory.mktemp("awkward")
    for name, content in export_train_step(plan, target).items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_any_name_of_a_parameter_gives_a_file_that_runs(awkward: Path) -> None:
    module = loaded(awkward)
    assert {layer.weight for layer in module.LAYERS} == {"a.b", *AWKWARD}
    assert len({layer.__name__ for layer in module.LAYERS}) == 1 + len(AWKWARD)
    described = [layer.__doc__ for layer in module.LAYERS]
    assert r"a\nb: a\nb." in described and 'three""": three""".' in described
    state = module.initial_state()
    before = {name: tensor.clone() for name, tensor in state["parameters"].items()}
    assert bool(torch.isfinite(module.step(state, *module.random_batch())))
    assert not any(torch.equal(state["parameters"][name], old) for name, old in before.items())


def test_layers_that_are_alike_as_variables_name_their_own_line(awkward: Path) -> None:
    """By the dict of statistics that the program returns, which is written from the nodes."""
    text = (awkward / "train_step.py").read_text()
    lines = text.split("\n")
    program = next(
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == "loss_gradients_and_statistics"
    )
    returned = next(
        ast.unparse(node.value)
        for node in program.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "statistics"
    )
    for key in ("a.b", "a_b", "é漢", "ö"):
        heading = next(n for n, line in enumerate(lines) if line.startswith(f"# {key} ("))
        for name in ("A", "G"):
            line = next(line for line in lines[heading:] if line.startswith(f"# {name}: "))
            found = re.search(r"; line (\d+), (\w+)$", line)
            assert found is not None, line
            assert lines[int(found[1]) - 1].startswith(f"    {found[2]} = ")
            own = returned.split(f"{key!r}: ")[1].split("}")[0]
            assert re.search(rf"'{name}': {found[2]}\b", own), (key, own)


def test_a_text_that_is_not_python_is_an_export_error(monkeypatch: pytest.MonkeyPatch) -> None:
    target = pixels()
    plan = kfac_fx.inspect(target.model, F.cross_entropy, target.inputs, target.targets)
    monkeypatch.setattr("kfac_fx.export.train_step.batch_text", lambda *_: "a line that is no Python")
    with pytest.raises(ExportError, match="not valid Python"):
        export_train_step(plan, target)
