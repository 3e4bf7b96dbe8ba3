"""The folder `passes/`: programs that run, diffs that apply, and names that stay from pass to pass."""

import ast
import difflib
import random
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.export.passes import passes, unified
from kfac_fx.export.subject import PassProgram, Subject, statistics_step
from kfac_fx.planned import Plan
from kfac_fx.target import Target, load_target

GOLDEN = Path(__file__).parent / "golden"
NAMES = (
    "captured",
    "matched",
    "guarded",
    "statistics",
    "averages",
    "preconditioned",
    "lengths",
    "products",
    "cleaned",
)
FILES = tuple(f"{number}-{name}.py" for number, name in enumerate(NAMES))


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target(f"{GOLDEN / 'tiny_gpt.py'}:build")


@pytest.fixture(scope="module")
def plan(target: Target) -> Plan:
    return kfac_fx.inspect(target.model, target.loss_fn, target.inputs, target.targets, method="kfac")


@pytest.fixture(scope="module")
def contents(plan: Plan, target: Target) -> Mapping[str, str]:
    found = {
        name.removeprefix("passes/"): text for name, text in passes(Subject(plan=plan, target=target)).items()
    }
    assert all(isinstance(text, str) for text in found.values())
    return found  # type: ignore[return-value]


def patched(old: list[str], diff: list[str]) -> list[str]:
    """A unified diff applied to its old text; context and removed lines have to be there."""
    new: list[str] = []
    position = 0
    for line in diff[2:]:
        if found := re.match(r"@@ -(\d+)", line):
            start = int(found[1]) - 1
            assert start >= position
            new += old[position:start]
            position = start
        elif line.startswith("+"):
            new.append(line[1:])
        else:
            assert line[0] in " -" and old[position] == line[1:]
            new += [line[1:]] if line[0] == " " else []
            position += 1
    return new + old[position:]


def statements(text: str) -> dict[str, str]:
    """Assignments of a program, by the name that they assign."""
    body = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)).body
    found = {}
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            name = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(name)] = ast.unparse(node.value)
    return found


def inputs_of(text: str) -> list[str]:
    found = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef))
    return [argument.arg for argument in found.args.args[1:]]


def executed(text: str, plan: Plan, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What a program returns for inputs by name."""
    scope: dict[str, type[nn.Module]] = {}
    exec(compile(text, "program", "exec"), scope)
    program = scope["Program"]()
    for name, constant in plan.capture.graph.named_buffers():
        program.register_buffer(name, constant)
    with torch.no_grad():
        return program(*(values[name] for name in inputs_of(text)))


def values_of(plan: Plan, target: Target) -> dict[str, Tensor]:
    """Parameters, buffers and the batch by the names of their inputs."""
    model = target.model
    tensors = [*model.parameters(), *model.buffers(), target.inputs, target.targets]
    names = [node.name for node in plan.capture.graph.graph.find_nodes(op="placeholder")]
    return {name: tensor.detach().clone() for name, tensor in zip(names, tensors, strict=True)}


def test_the_folder_has_a_program_per_pass_and_the_diffs_between_them(contents: Mapping[str, str]) -> None:
    diffs = [f"{number}-{number + 1}.diff" for number in range(len(FILES) - 1)]
    assert list(contents) == [*FILES, *diffs, "step-without-statistics.py"]


@pytest.mark.parametrize("file", [*FILES, "step-without-statistics.py"])
def test_a_program_is_python_without_paths(contents: Mapping[str, str], file: str) -> None:
    ast.parse(contents[file])
    assert str(GOLDEN) not in contents[file] and "site-packages" not in contents[file]
    assert "/home" not in contents[file] and str(Path.cwd()) not in contents[file]
    assert contents[file].startswith("# TinyGPT")
    assert not [line for line in contents[file].splitlines() if line != line.rstrip()]


@pytest.mark.parametrize("number", range(len(FILES) - 1))
def test_a_diff_makes_the_next_program(contents: Mapping[str, str], number: int) -> None:
    old, new = contents[FILES[number]].splitlines(), contents[FILES[number + 1]].splitlines()
    diff = contents[f"{number}-{number + 1}.diff"].splitlines()
    assert diff[:2] == [f"--- passes/{FILES[number]}", f"+++ passes/{FILES[number + 1]}"]
    assert patched(old, diff) == new


@pytest.mark.parametrize("number", range(FILES.index("5-preconditioned.py")))
def test_a_pass_that_inserts_leaves_every_other_line_as_it_was(
    contents: Mapping[str, str], number: int
) -> None:
    before, after = (statements(contents[file]) for file in FILES[number : number + 2])
    assert before.items() <= after.items()
    removed = [
        line for line in contents[f"{number}-{number + 1}.diff"].splitlines()[2:] if line.startswith("-")
    ]
    for line in removed:  # the header, comments behind inputs, and outputs that are replaced
        assert re.match(r"-(#|from torch| +\w+: .*,$| +\w+,  # )", line), line


def test_matching_adds_comments_alone(contents: Mapping[str, str]) -> None:
    captured, matched = (ast.dump(ast.parse(contents[file])) for file in FILES[:2])
    assert captured == matched
    assert "# kfac_fx: weight gradient of head" in contents["1-matched.py"]
    assert "kfac_fx:" not in contents["0-captured.py"]


def test_lengths_change_how_directions_go_back_alone(contents: Mapping[str, str]) -> None:
    before, after = (statements(contents[f"{file}.py"]) for file in ("5-preconditioned", "6-lengths"))
    changed = {name for name in before if after[name] != before[name]}
    for name in changed:
        assert "_direction" in before[name]
        assert re.sub(r"_scaled\b", "_direction", after[name]) == before[name]
    assert changed


def test_products_leave_every_other_line_as_it_was(contents: Mapping[str, str]) -> None:
    before, after = (statements(contents[f"{file}.py"]) for file in ("6-lengths", "7-products"))
    assert before.items() <= after.items() and "products" in after.keys() - before.keys()
    returned = contents["7-products.py"].split("return (")[1]
    assert returned.rstrip(") \n").endswith("products,  # <V, grad> of each layer")


def test_cleaning_inserts_nothing(contents: Mapping[str, str]) -> None:
    before, after = (statements(contents[f"{file}.py"]) for file in ("7-products", "8-cleaned"))
    assert after.keys() < before.keys()


def test_statistics_of_each_layer_stand_under_a_rule_that_the_diff_names(
    contents: Mapping[str, str], plan: Plan
) -> None:
    hunks = [line for line in contents["2-3.diff"].splitlines() if line.startswith("@@")]
    for match in plan.matched:
        rule = f"        # ---- statistics: {match.name} -"
        count = sum(line.startswith(rule) for line in contents["3-statistics.py"].splitlines())
        assert count == (0 if match.shared_a != match.key and match.structure == "diagonal" else 1)
    assert any(re.search(r"@@ statistics: \S+$", hunk) for hunk in hunks)


def test_outputs_are_named(contents: Mapping[str, str], plan: Plan) -> None:
    returned = contents["8-cleaned.py"].split("return (")[1]
    assert "  # loss\n" in returned and "  # 1/R_\n" in returned
    for name in plan.capture.gradients:
        assert re.search(rf"  # (update|gradient) of {re.escape(name)}\n", returned)
    assert "  # new A of " in returned and "batch A" not in returned


@pytest.mark.parametrize("file", FILES[: FILES.index("3-statistics.py") + 1])
def test_programs_give_autograds_loss_and_gradients(
    contents: Mapping[str, str], plan: Plan, target: Target, file: str
) -> None:
    assert target.loss_fn is not None
    named = {name: p for name, p in target.model.named_parameters() if p.requires_grad}
    loss = target.loss_fn(target.model(target.inputs), target.targets)
    wanted = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    results = executed(contents[file], plan, values_of(plan, target))
    labels = re.findall(r"^ +\w+,  # (.+)$", contents[file].split("return (")[1], re.MULTILINE)
    found = dict(zip(labels, results, strict=True))
    assert torch.equal(found["loss"], loss)
    for name, gradient in zip(named, wanted, strict=True):
        if gradient is not None:
            assert torch.equal(found[f"gradient of {name}"], gradient)


def test_the_last_program_is_what_the_step_runs(contents: Mapping[str, str], target: Target) -> None:
    """By the new factors: those of the program, and those of a step from the same state."""
    assert target.loss_fn is not None
    step = kfac_fx.compile(target.model, target.loss_fn, optimizer=zero_steps(target.model))
    step(target.inputs, target.targets)
    state = step.state_dict()["curvature"]
    values = values_of(step.plan, target)
    for layer, tensors in state.items():
        clean = "".join(c if c.isalnum() else "_" for c in layer).strip("_")
        values |= {f"s_{clean}_{name}": tensor for name, tensor in tensors.items()}
    values["weights"] = torch.zeros(len(step.plan.matched))
    values["learning_rates"] = torch.full((len(step.plan.matched),), 0.1)
    text = contents["8-cleaned.py"]
    labels = re.findall(r"^ +\w+,  # (.+)$", text.split("return (")[1], re.MULTILINE)
    found = dict(zip(labels, executed(text, step.plan, values), strict=True))
    for label, tensor in found.items():
        if label.startswith("new "):  # the share of the new batch is 0
            name, _, layer = label.removeprefix("new ").partition(" of ")
            assert torch.equal(tensor, state[layer][name])
    update, gradient = found["update of head.weight"], gradient_of(target, "head.weight")
    assert float((update * gradient).sum()) > 0 and not torch.equal(update, gradient)


def zero_steps(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


def gradient_of(target: Target, name: str) -> Tensor:
    assert target.loss_fn is not None
    loss = target.loss_fn(target.model(target.inputs), target.targets)
    return torch.autograd.grad(loss, [dict(target.model.named_parameters())[name]])[0]


def test_a_pass_that_is_off_has_no_program(target: Target) -> None:
    with kfac_fx.without_passes("averages"):
        plan = kfac_fx.inspect(target.model, target.loss_fn, target.inputs, target.targets)
    files = [program.file for program in statistics_step(plan).texts]
    assert files == [
        "0-captured.py",
        "1-matched.py",
        "2-guarded.py",
        "3-statistics.py",
        "4-preconditioned.py",
        "5-lengths.py",
        "6-products.py",
        "7-cleaned.py",
    ]
    assert "without averages" in statistics_step(plan).texts[-1].text.splitlines()[2]


def test_names_that_end_a_comment_give_programs_that_are_python() -> None:
    names = ("a\nb = 1 +", "\x0c(", 'three"""', "back\\", "\u2028c")
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(3, 3))
    batch = torch.ones(2, 3)
    plan = kfac_fx.inspect(model, nn.MSELoss(), batch, batch)
    target = Target(model=model, loss_fn=nn.MSELoss(), inputs=batch, targets=batch, label="names")
    for file, text in passes(Subject(plan=plan, target=target)).items():
        assert isinstance(text, str) and len(text.splitlines()) == text.count("\n")
        if file.endswith(".py"):
            ast.parse(text)
    assert r"# parameter a\nb = 1 +.weight" in text


def test_a_program_of_one_layer_says_so_in_the_singular() -> None:
    batch = torch.ones(2, 3)
    plan = kfac_fx.inspect(nn.Linear(3, 3), nn.MSELoss(), batch, batch)
    notes = [text.splitlines()[3] for text in (program.text for program in statistics_step(plan).texts)]
    assert any(note.endswith(" of 1 layer") for note in notes) and not any("1 layers" in n for n in notes)


def program(text: str, file: str = "a.py") -> PassProgram:
    return PassProgram(name="", file=file, text=text)


@pytest.mark.parametrize("seed", range(40))
def test_a_diff_is_the_standard_librarys(seed: int) -> None:
    """By texts whose lines stand once and keep their order: there is one shortest diff."""
    draw = random.Random(seed)
    lines = [f"line {number}" for number in range(draw.choice((0, 1, 12, 60)))]
    old = [line for line in lines if draw.random() > 0.1]
    new = [line for line in lines if draw.random() > 0.1]
    new[draw.randrange(len(new) + 1) :] += ["# ---- added ---"] * draw.randrange(3)
    wanted = difflib.unified_diff(old, new, "passes/a.py", "passes/b.py", lineterm="")
    found = unified(program("\n".join(old)), program("\n".join(new), "b.py")).splitlines()
    assert found[:2] == ["--- passes/a.py", "+++ passes/b.py"]
    assert found[2:] == list(wanted)[2:]


class Line(str):
    """A line that counts how often it is compared or looked up."""

    looks = 0

    def __eq__(self, other: object) -> bool:
        Line.looks += 1
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        Line.looks += 1
        return str.__hash__(self)


class Text(str):
    def splitlines(self, keepends: bool = False) -> list[str]:
        return [Line(line) for line in str.splitlines(self, keepends)]


def test_the_work_of_a_diff_grows_with_the_lines_and_not_with_their_square() -> None:
    """Eight times the layers: 8 times the looks at a line, where a square would be 64."""
    looks = {}
    for layers in (20, 160):
        old = [line for layer in range(layers) for line in (f"a{layer} = mm(x)", "# backward", "")]
        new = [line for a in old for line in ([a, "# inserted", f"b = {a}"] if "mm" in a else [a])]
        Line.looks = 0
        text = unified(program(Text("\n".join(old))), program(Text("\n".join(new))))
        looks[layers] = Line.looks
        assert text.count("\n+") > 2 * layers
    assert looks[160] < 10 * looks[20]
