"""Where a base model comes from; quantizers; adapters; target selection."""

import logging

# It warns, while it is imported, of kernels that it could fetch from a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
