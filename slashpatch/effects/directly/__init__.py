"""What an edit writes to the residual stream, and what the final norm makes of it."""
