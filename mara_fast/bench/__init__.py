"""Benchmarks of decoding, ours and others'."""
