"""Rows to batches: which words are hidden, as a function of seed, epoch and row."""
