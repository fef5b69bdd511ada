"""What edits do to a model: metrics, controls, statistics, and the functions that measure."""
