"""How often intervals cover and tests reject, by simulation: `python benchmarks/statistics.py`.

Takes about five minutes on two cores and writes the tables of docs/statistics.md. A run that was
stopped goes on where it was.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    from simulation import main

    main(*map(int, sys.argv[1:]))
else:
    # For the other scripts of this folder, which want Python's own module of this name.
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = Path(__file__).resolve().parent
    spec = PathFinder.find_spec(
        "statistics", [entry for entry in sys.path if Path(entry).resolve() != here]
    )
    assert spec is not None
    sys.modules[__name__] = module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(sys.modules[__name__])
