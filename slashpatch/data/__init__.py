"""Input and output: prompts, result files, journals of resumable runs, progress bars."""
