"""What goes wrong with adapters: copying the training answers, forgetting, answers all alike, drift, leaks."""
