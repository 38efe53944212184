"""Triton kernels, one file per op; installed as `mghf_fast.kernels`. This version has none yet."""
