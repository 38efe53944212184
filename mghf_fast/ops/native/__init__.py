"""The kernels in C++ behind the ops' dialect: one class per op for the CPU's and CUDA's alike.

They are called by the same schemas (`csrc/ops`). What differs is what each reads: those of the CPU
float32 and, as images, bfloat16, so that the rest is converted here; those of CUDA every type.
"""
