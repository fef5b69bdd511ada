"""Pairs of prompts, and activations of one run put into the other."""
