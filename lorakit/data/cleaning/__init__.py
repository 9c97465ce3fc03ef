"""Hygiene: what is wrong with rows, alone and beside each other, and what of it can be put right."""
