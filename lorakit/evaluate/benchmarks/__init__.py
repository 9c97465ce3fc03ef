"""Benchmarks: lm-eval's tasks on the models of an evaluation."""
