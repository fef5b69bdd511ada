"""Softmax attention of one layer without forming its query × key matrix."""
