"""Slash scores over prompts (scan) and while a model runs (SlashMonitor)."""
