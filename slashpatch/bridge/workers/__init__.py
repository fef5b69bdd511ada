"""Worker processes that each hold the model, by Ray: on one machine, or on those of a cluster.

Nothing here knows what the work is. A `Job` (`pool.py`) says it, and rooms above define jobs.
"""
