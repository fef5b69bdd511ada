"""Effects of edits: measure, flow, copying, paths and sweep, with controls and statistics."""
