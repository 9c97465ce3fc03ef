"""Cleaning: what is wrong with rows, alone and among the others, and what of it can be fixed."""
