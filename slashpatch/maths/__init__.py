"""Pure functions on tensors. Nothing here imports TransformerLens or Transformers."""
