"""Model folders -> scores and comparisons."""
