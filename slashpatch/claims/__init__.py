"""The claims of arXiv 2601.08297, settled on any model: estimates, controls, rules, verdicts."""
