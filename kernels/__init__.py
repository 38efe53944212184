"""Triton kernels, one op per name; installed as `mghf_fast.kernels`.

A file named after an op has the functions of every backend (see `mghf_fast/ops/_dispatch.py`):
`forward`, `backward`, `can_run`; `mghf_fast/ops/<op>.py` registers it by name as backend "triton".
Nothing here is imported before a kernel is needed, so Triton stays optional. Under
TRITON_INTERPRET=1 the same functions run on CPU tensors.
"""
