"""Benchmarks: each module is one entry of `aroface bench`; `measure` times, `peers` rebuilds the ways of others."""
