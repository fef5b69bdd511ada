"""Runs of a model under conditions, on prompts, and what they need."""
