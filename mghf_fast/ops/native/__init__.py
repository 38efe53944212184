"""The C++ kernels with the ops' common interface: one class per op for both CPU and CUDA.

Both are called by the same schemas (`csrc/ops`), but differ in the types that they read: the CPU's
only float32 and, for images, bfloat16, so that other types are converted here; CUDA's every type.
"""
