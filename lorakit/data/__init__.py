"""Sources -> rows -> conversations -> examples."""
