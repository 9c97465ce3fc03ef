"""Runs and recipes that travel: packed into one file, unpacked elsewhere."""
