"""Benchmarks: `river bench NAME`. Each compares us with a peer on the same work, in one run, alternating."""
