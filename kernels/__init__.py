"""Triton kernels, one file per op; installed as `mghf_fast.kernels`.

A file's functions take and return plain tensors; `mghf_fast/ops/<op>.py` registers them as backend
"triton". Nothing here is imported before a kernel is wanted, so Triton stays optional. Under
TRITON_INTERPRET=1 the same functions run on CPU tensors.
"""
