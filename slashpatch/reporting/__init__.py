"""Show results: tables and heatmaps in the terminal, figures in files."""
