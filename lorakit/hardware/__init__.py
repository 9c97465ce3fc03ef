"""The machine that a run uses: its processors and GPUs, its memory and limits, and how fast it is."""
