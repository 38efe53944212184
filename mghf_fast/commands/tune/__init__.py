"""Measures which kernels are fastest on this machine's GPU."""
