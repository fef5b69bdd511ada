"""What people look at: tables and heatmaps in the terminal, figures in files, progress bars."""
