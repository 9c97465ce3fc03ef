"""Runs and recipes that travel: from another tool's config, packed into one file, unpacked elsewhere."""
