"""lorakit: fine-tune language models with LoRA from one YAML recipe."""

import logging

__version__ = "0.1.0"

# It warns, while it is imported, of kernels that it could fetch from a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# It warns on standard output, and other libraries import it wherever it is installed.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
