"""The papers' mathematics in plain PyTorch: the oracle of every test, and the fallback everywhere.

One file per op, its equations on top. The forward functions are differentiable by autograd at any
float dtype; the `*_backward` functions are the closed forms that every kernel implements. As a
backend a file has the common interface `forward`, `backward`, `can_run` (see `ops/_dispatch.py`).
"""
