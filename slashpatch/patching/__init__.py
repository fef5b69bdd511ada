"""Attach edits to a model: patch, hooks, per-head keys, the fused engine."""
