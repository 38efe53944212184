// The namespace in which the native ops are registered: `torch.ops.mghf_native`, or another for a
// build that is loaded beside the installed one.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef MGHF_LIBRARY
#define MGHF_LIBRARY mghf_native
#endif
