"""What this machine can do, and what is broken on it. No module here needs torch to be imported."""
