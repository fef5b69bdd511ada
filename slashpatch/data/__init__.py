"""What a run reads and writes: prompts, files, the journal of a resumable run, progress bars."""
