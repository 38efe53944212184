// Some ops have newer and older kernels. A device uses the newer ones, unless they failed a trial
// there (mghf_fast/trials.py).
#pragma once

#include <mutex>
#include <shared_mutex>

namespace mghf::cuda {

enum class Variant { coupling, monce, patches, content_style };  // named as the ops

// Whether the newer kernels run on the current device.
bool newest(Variant variant);

// As long as it lives nothing changes: an op sizes its workspace for the kernels that it launches
// then.
std::shared_lock<std::shared_mutex> hold_variants();

}  // namespace mghf::cuda

// Lets a device use the op's older kernels, or the newer ones again; returns whether there are any.
// Python calls it in the library that is loaded.
extern "C" __attribute__((visibility("default"))) int mghf_cuda_use_older(const char* op, int device,
                                                                          int older);
