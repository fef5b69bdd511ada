"""An edit with a number: its edits, and the trend of its effect."""
