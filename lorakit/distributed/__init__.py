"""Several processes that train one adapter: joined, in agreement, and watched."""
