"""Softmax attention of one layer whose matrix is never formed."""
