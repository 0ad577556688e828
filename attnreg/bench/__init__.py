"""Benchmarks: attnreg against its peers, interleaved, as paired ratios with intervals and shares of the peaks."""
