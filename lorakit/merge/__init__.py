"""Adapter and base -> merged weights, and the proof."""
