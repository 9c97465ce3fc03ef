"""Recipes and runs that travel: imported, listed, compared, packed into one file, unpacked elsewhere."""
