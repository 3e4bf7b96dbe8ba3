"""What only a GPU can show: `python tests/benchmarks/cuda_checks.py` (its networks need about 40 GiB there).

    equal     losses of compiled steps (inductor, CUDA graphs) against eager ones, on the GPU and on the CPU
    tf32      A of a wide layer against float64, with TF32 allowed for the model
    waits     steps after the first ones under `torch.cuda.set_sync_debug_mode("error")`
    replays   CUDA graphs that a step launches, and programs that torch refused to record
    times     ResNet-50 (224x224, batch 64) and GPT-2 small (batch 8 of 512 tokens) against SGD and AdamW, all
              compiled; and the share of the GPU's float32 peak, measured as a product of two matrices, that
              the statistics reach

`cuda_checks.py equal waits` runs those two; `--small` takes small networks for `times`. Ends with status 1 if
a check fails, 2 without a GPU. Saves cuda_checks.json in build/benchmarks.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from networks import gpt2_small, next_token_loss, resnet20, resnet50, small_transformer
from records import OUTPUT, save
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.bench import bench, show

Loss = Callable[[Tensor, Tensor], Tensor]
Subject = tuple[nn.Module, Loss, Tensor, Tensor]
METHODS = {
    "kfac": kfac_fx.KFAC(statistics_every=2, inverse_every=4),
    "nkfac": kfac_fx.NKFAC(statistics_every=2, inverse_every=4, exact_every=2),
}
WITHOUT_WAITS = METHODS | {
    "kfac relative": kfac_fx.KFAC(damping_rule="relative", statistics_every=2, inverse_every=4),
    "skfac": kfac_fx.SKFAC(statistics_every=2, inverse_every=4, window=2),
}
STEPS, WARMUP = 12, 12


def images(model: nn.Module, *, batch: int, size: int, classes: int = 10) -> Subject:
    """A model with random images."""
    return model, F.cross_entropy, torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))


def tokens(model: nn.Module, *, batch: int, length: int, vocabulary: int) -> Subject:
    """A model with random tokens."""
    return model, next_token_loss, *torch.randint(vocabulary, (2, batch, length)).unbind()


def small() -> dict[str, Subject]:
    """Subjects that train in milliseconds."""
    torch.manual_seed(0)
    return {
        "ResNet-20": images(resnet20(), batch=32, size=32),
        "transformer": tokens(small_transformer(num_blocks=2), batch=8, length=128, vocabulary=256),
    }


def large() -> dict[str, Subject]:
    """Subjects of the published kind."""
    torch.manual_seed(0)
    return {
        "ResNet-50": images(resnet50(), batch=64, size=224, classes=1000),
        "GPT-2 small": tokens(gpt2_small(), batch=8, length=512, vocabulary=50257),
    }


def moved(subject: Subject, device: torch.device) -> Subject:
    """A copy on the device."""
    model, loss, inputs, targets = subject
    return copy.deepcopy(model).to(device), loss, inputs.to(device), targets.to(device)


def stepped(subject: Subject, method: Any, *, backend: str) -> Callable[[], Tensor]:
    """One training step on the subject's batch."""
    model, loss, *batch = subject
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    step = kfac_fx.compile(model, loss, method=method, optimizer=optimizer, backend=backend)
    return lambda: step(*batch)


def check_equal(device: torch.device) -> dict[str, float]:
    """Largest relative difference of the losses of eager steps on the CPU."""
    found = {}
    for name, subject in small().items():
        for label, method in METHODS.items():
            reference = losses(moved(subject, torch.device("cpu")), method, "eager")
            for backend in ("eager", "inductor-no-cudagraphs", "inductor"):
                own = losses(moved(subject, device), method, backend)
                found[f"{name}, {label}, {backend}"] = float(((own - reference) / reference).abs().max())
    return found


def losses(subject: Subject, method: Any, backend: str) -> Tensor:
    """Of the steps of a short training."""
    step = stepped(subject, method, backend=backend)
    return torch.stack([step() for _ in range(STEPS)]).double().cpu()


def check_tf32(device: torch.device) -> dict[str, float]:
    """Relative error of a layer's A, with TF32 allowed for the model."""
    inputs, targets = torch.randn(4096, 512, device=device) + 3, torch.randint(10, (4096,), device=device)
    before, found = torch.get_float32_matmul_precision(), {}
    torch.set_float32_matmul_precision("high")
    try:
        for backend in ("eager", "inductor"):
            model = nn.Linear(512, 10, bias=False, device=device)
            method = kfac_fx.KFAC(decay=0.0, statistics_every=1, inverse_every=100)
            step = kfac_fx.compile(model, F.cross_entropy, method=method, backend=backend)
            for _ in range(4):
                step(inputs, targets)
            a = step.state_dict()["curvature"]["weight"]["A"][0].double()
            exact = inputs.double().mT @ inputs.double() / len(inputs)
            found[backend] = float((a - exact).norm() / exact.norm())
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def check_waits(device: torch.device) -> dict[str, str]:
    """The first thing that each training waited for; "nothing" if there is none."""
    found = {}
    for name, subject in small().items():
        for label, method in WITHOUT_WAITS.items():
            step = stepped(moved(subject, device), method, backend="inductor")
            for _ in range(WARMUP):
                step()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(STEPS):
                    step()
                found[f"{name}, {label}"] = "nothing"
            except RuntimeError as error:
                found[f"{name}, {label}"] = str(error).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return found


def check_replays(device: torch.device) -> dict[str, int]:
    """CUDA graphs launched per step, and programs that torch does not record."""
    counters = torch._dynamo.utils.counters["inductor"]
    found = {}
    for name, subject in small().items():
        counters.clear()
        step = stepped(moved(subject, device), METHODS["kfac"], backend="inductor")
        for _ in range(WARMUP):
            step()
        with torch.profiler.profile() as profile:
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize()
        launches = sum(e.count for e in profile.key_averages() if "GraphLaunch" in e.key)
        found[f"{name}, graphs launched in {STEPS} steps"] = launches
        found[f"{name}, programs not recorded"] = counters["cudagraph_skips"]
    return found


def peak(device: torch.device) -> float:
    """FLOP/s of a product of two large matrices in float32."""
    left, right = torch.randn(2, 8192, 8192, device=device).unbind()
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        left @ right
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - start)


def times(device: torch.device, subjects: Mapping[str, Subject], console: Console) -> dict[str, Any]:
    """Step times, printed, and what the statistics reach of the peak."""
    most, found = peak(device), {}
    console.print(f"measured peak in float32: {most / 1e12:.1f} TFLOP/s")
    for name, subject in subjects.items():
        model, *data = moved(subject, device)
        report = bench(model, *data, steps=30, backend="inductor")
        show(report, console)
        plan = kfac_fx.inspect(model, *data, method="kfac")
        flops = sum(factor.flops_statistics for factor in plan.factors if factor.shared_with is None)
        entry = next(entry for entry in report.contenders if entry.label == "kfac")
        seconds = {phase.name: phase.seconds for phase in entry.phases}["statistics"]
        share = flops / seconds / most
        console.print(f"{name}: statistics of {flops / 1e12:.3f} TFLOP reach {share:.0%} of the peak\n")
        ratios = {entry.label: report.ratios(entry) for entry in report.contenders}
        found[name] = {"share of peak": share, "ratios to SGD": ratios}
    return found


def failures(results: Mapping[str, Any]) -> list[str]:
    """What is not as it should be."""
    failed = [f"equal: {k} differs by {v:.1e}" for k, v in results.get("equal", {}).items() if not v < 2e-3]
    failed += [f"tf32: {k} has error {v:.1e}" for k, v in results.get("tf32", {}).items() if not v < 1e-5]
    failed += [f"waits: {k}: {v}" for k, v in results.get("waits", {}).items() if v != "nothing"]
    for name, count in results.get("replays", {}).items():
        if (count == 0) == ("launched" in name):
            failed.append(f"replays: {name}: {count}")
    return failed


def main() -> int:
    """The checks that were asked for."""
    checks = {"equal": check_equal, "tf32": check_tf32, "waits": check_waits, "replays": check_replays}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", help=f"of {', '.join([*checks, 'times'])}; all if none is named")
    parser.add_argument("--small", action="store_true", help="small networks for times")
    arguments = parser.parse_args()
    chosen = arguments.checks or [*checks, "times"]
    if unknown := sorted(set(chosen) - {*checks, "times"}):
        parser.error(f"no such check: {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print(
            "cuda_checks.py needs a CUDA device and a build of torch for it: nothing was checked.",
            file=sys.stderr,
        )
        return 2
    device, console = torch.device("cuda"), Console()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(device)}
    console.print(results["device"])
    for name in chosen:
        if name == "times":
            results[name] = times(device, small() if arguments.small else large(), console)
            continue
        results[name] = checks[name](device)
        for what, value in results[name].items():
            console.print(
                f"{name}: {what}: {value:.2e}" if isinstance(value, float) else f"{name}: {what}: {value}"
            )
    save(results, OUTPUT / "cuda_checks.json")
    failed = failures(results)
    for line in failed:
        console.print(f"FAILED {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
