"""Sets of heads or diagonals: their members, and their shares of an effect."""
