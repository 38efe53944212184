// Kernels with or without a fault, for testing that sanitizers and emulator find such faults. Each
// takes 64 numbers and returns them, reversed if it says so; fault 0 is none.
#pragma once

#include "../../csrc/cuda/device.h"

namespace mghf::cuda {

// Reversed. 1: without the barrier, a race; 2: with a barrier that only half of the block reaches.
const char* planted_barrier(const int* x, int* result, int fault, Stream stream);
// The first place in 64 numbers of shared memory that is used: all but 0 is wrong.
const char* planted_index(const int* x, int* result, int first, Stream stream);
// Reversed, by a cluster of two blocks. 1: without the barrier of the cluster, a race.
const char* planted_cluster(const int* x, int* result, int fault, Stream stream);
// Reversed, through asynchronous copies. 1: without waiting for them; 2: without the barrier, a race.
const char* planted_copy(const int* x, int* result, int fault, Stream stream);
// Reversed, through a ring that bulk copies fill. 1: without waiting for them; 2: a slot is filled
// again before it was read, a race; 3: a byte count that never becomes right.
const char* planted_ring(const int* x, int* result, int fault, Stream stream);
// Reversed, through a workspace in device memory: each of the grid's clusters has a part of it.
// Clusters of one block, and of two. 1: all have the same part. They run one after the other, so the result is
// right, but ThreadSanitizer sees a race.
const char* planted_workspace(const int* x, int* result, int fault, Stream stream);
const char* planted_workspaces(const int* x, int* result, int fault, Stream stream);

}  // namespace mghf::cuda
