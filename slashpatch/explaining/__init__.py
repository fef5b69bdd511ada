"""Explain why a head is a slash head: by RoPE and rank-one queries and keys, or by content."""
