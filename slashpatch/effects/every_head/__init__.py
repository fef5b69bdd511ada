"""An edit at every head: its variants, their passes, estimates by gradients."""
