"""One self-contained page about one or several runs, made from their folders alone."""
