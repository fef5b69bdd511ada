"""Fixtures. Shapes and types are checked at run time: see addopts in pyproject.toml."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ADDRESS", "local")  # no cluster that happens to run on this machine
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Processes that together use more threads than there are cores wait for one another; set before
    # torch is imported, and for the commands that tests start.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest
from hypothesis import HealthCheck, settings

import slashpatch

from .browser import browser  # noqa: F401
from .cluster import cluster, two_nodes  # noqa: F401

settings.register_profile(
    "slashpatch",
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("slashpatch")


@pytest.fixture(autouse=True)
def threads(request):
    """One thread for tiny models, whose operations are too short to share; all for the real one."""
    import torch

    before = torch.get_num_threads()
    if request.node.get_closest_marker("real") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny():
    """A tiny Llama with grouped-query attention: 2 layers, 4 heads on 2 kv heads."""
    from .tiny import tiny_model

    return tiny_model(seed=0)


@pytest.fixture(scope="session")
def real():
    """The default model."""
    return slashpatch.load(device="cpu")


@pytest.fixture
def unchecked():
    """Without run-time type checks: the user's view of a wrong type, which is our own message."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
