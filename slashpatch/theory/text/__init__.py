"""A small language model that learns from text with the Hugging Face Trainer, measured on the way.

Unlike the rest of `theory`, this room needs Transformers and TransformerLens.
"""
