"""Pure tensor functions: no model library is imported here."""
