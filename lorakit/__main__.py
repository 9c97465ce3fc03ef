"""`python -m lorakit`."""

from lorakit.cli import main

main()
