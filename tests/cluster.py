"""A Ray cluster of two nodes on this machine, one CPU each, for the tests of workers."""

import os
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[1])
#: Workers are processes of their own: they import this checkout, and read no hub.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


class TwoNodes:
    """Attributes: `cluster`, of Ray; `second`, the node that has no driver and may be killed."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        # Little of the memory of objects, which containers may have little of.
        self.node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=self.node)
        self.second = self.cluster.add_node(**self.node)

    def mend(self):
        """Put a new second node in place of one that was killed."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = self.cluster.add_node(**self.node)


@pytest.fixture(scope="session")
def two_nodes():
    pytest.importorskip("ray", reason="the extra ray is not installed")
    paths = os.pathsep.join(path for path in (ROOT, os.environ.get("PYTHONPATH")) if path)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {**ENVIRONMENT, "PYTHONPATH": paths}.items():
            patched.setenv(name, value)
        found = TwoNodes()
    yield found
    found.cluster.shutdown()


@pytest.fixture
def cluster(two_nodes, monkeypatch):
    """The cluster, which is what RAY_ADDRESS names."""
    monkeypatch.setenv("RAY_ADDRESS", two_nodes.cluster.address)
    return two_nodes
