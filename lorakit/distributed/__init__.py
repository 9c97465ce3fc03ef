"""Several processes of one command: started, joined, in agreement, and watched."""
