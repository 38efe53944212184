// Kernels with a fault, or without it, for the tests that the sanitizers find such faults.
#pragma once

#include "device.h"

namespace mghf::cuda {

// result = x reversed, 64 numbers; without the barrier a race.
const char* planted_race(const int* x, int* result, bool barrier, Stream stream);
// result = x, 64 numbers, through 64 of shared memory from `first` on; 0 is right.
const char* planted_index(const int* x, int* result, int first, Stream stream);

}  // namespace mghf::cuda
