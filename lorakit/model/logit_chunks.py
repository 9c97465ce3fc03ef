"""How many logits the loss head has at once: the planner counts what training holds."""

# On a processor, whose cache a few rows of logits overflow anyway: 128 MiB in float32.
CHUNK_LOGITS = 1 << 25
# On a GPU a product of few positions waits for its kernels. It gets logits that take this part of its memory, at so
# many bytes each: in half precision, in float32, and their gradient in both.
_PART, _BYTES = 64, 12


def chunk_logits(card: int = 0) -> int:
    """The logits that are held at once, on a GPU with so many bytes of memory, or on a processor."""
    return max(CHUNK_LOGITS, card // (_PART * _BYTES))
