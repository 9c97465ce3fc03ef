"""Where a base model comes from; quantizers; adapters; target selection."""
