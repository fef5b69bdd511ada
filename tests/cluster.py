"""A Ray cluster of two nodes on this machine, one CPU each, for the tests of workers."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = str(Path(__file__).parents[1])
#: Workers are processes of their own: they import this checkout, and read no hub. Where a machine
#: is busy, Ray must not kill them since others take memory or disk, nor because they start slowly.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_local_fs_capacity_threshold": "1",
    "RAY_worker_register_timeout_seconds": "300",
}
#: How often a cluster is started at most: Ray gives each node half a minute.
STARTS = 3


class TwoNodes:
    """Attributes: `cluster`, of Ray; `second`, the node that has no driver and may be killed."""

    def __init__(self, folder):
        from ray.cluster_utils import Cluster

        paths = [path for path in (ROOT, os.environ.get("PYTHONPATH")) if path]
        self.environment = {
            **ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join(paths),
            "RAY_TMPDIR": folder,
        }
        # Little of the memory of objects, which containers may have little of.
        self.node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        self.cluster = Cluster()
        try:
            self.add()
            self.second = self.add()
        except BaseException:
            self.shutdown()
            raise

    def add(self):
        """Return a new node."""
        with self.patched():
            return self.cluster.add_node(**self.node)

    def mend(self):
        """Put a new second node in place of one that was killed."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = self.add()

    def shutdown(self):
        """End all nodes."""
        with self.patched():
            self.cluster.shutdown()

    @contextmanager
    def patched(self):
        """Set the nodes' environment variables for a while."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            yield


def started(folder):
    """Return a cluster of two nodes, tried again if it does not start; one at a time everywhere."""
    lock = Path(tempfile.gettempdir()) / f"slashpatch-tests-ray-{os.getuid()}.lock"
    with FileLock(lock):
        for left in reversed(range(STARTS)):
            try:
                return TwoNodes(folder)
            except Exception:  # Ray raises a bare Exception for a node that starts too slowly
                if not left:
                    raise


@pytest.fixture(scope="session")
def two_nodes():
    pytest.importorskip("ray", reason="the extra ray is not installed")
    # Not in TMPDIR, whose path may be too long for Ray's sockets.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    found = started(folder)
    yield found
    found.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(two_nodes, monkeypatch):
    """The cluster, which is what RAY_ADDRESS names."""
    monkeypatch.setenv("RAY_ADDRESS", two_nodes.cluster.address)
    return two_nodes
