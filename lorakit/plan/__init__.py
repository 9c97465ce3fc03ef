"""Recipe and machine -> every `auto` settled, with its reason."""
