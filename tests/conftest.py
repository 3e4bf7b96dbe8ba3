"""Every test starts from the same seeds, on one thread, in torch's own default dtype."""

import gc
import os
import random
from collections.abc import Iterator

import hypothesis
import numpy
import pytest
import torch

from kfac_fx import trace, traces
from kfac_fx.export.subject import StatisticsStep, statistics_step
from kfac_fx.planned import Plan
from tests.pages import GOLDEN, plan_of
from tests.shared_captures import remembering

SEED = 0

os.environ.pop("COLUMNS", None)  # reports are as wide as they are where nobody asks for a width
torch.set_num_threads(1)
hypothesis.settings.register_profile("kfac_fx", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("kfac_fx")


def pytest_collection_finish() -> None:
    """Collections of garbage leave out what the imports made, and are rarer: a tenth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def same_seeds() -> None:
    """A test draws the same numbers alone, in any order and in any process."""
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def default_dtype_is_untouched() -> Iterator[None]:
    """A test that wants float64 asks for it on its tensors; the global default stays float32."""
    assert torch.get_default_dtype() is torch.float32
    yield
    changed = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert changed is torch.float32, f"the test left {changed} as the default dtype"


@pytest.fixture(autouse=True)
def replaced_functions_are_not_found_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """Captures find the traces of earlier ones, but not those of functions that a test replaces."""
    replaces = "monkeypatch" in request.fixturenames
    if replaces:
        traces.forget()
    yield
    if replaces:
        traces.forget()


@pytest.fixture(scope="module")
def equal_models_share_a_capture() -> Iterator[None]:
    """In the test files that ask for it, a model is captured once for all methods."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "capture", remembering(trace.capture))
        yield


@pytest.fixture(scope="session")
def gpt_plan() -> Plan:
    """Of the small transformer in `golden`; the tests of reports and pages read it, and write nothing."""
    return plan_of(f"{GOLDEN / 'tiny_gpt.py'}:build")


@pytest.fixture(scope="session")
def gpt_step(gpt_plan: Plan) -> StatisticsStep:
    """Its step with statistics."""
    return statistics_step(gpt_plan)
