"""Draw with fixed prompts and seeds, compare, and show."""
