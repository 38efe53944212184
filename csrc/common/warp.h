// Threads of a warp, on every GPU and in the emulator.
#pragma once

namespace mghf {

constexpr int kWarp = 32;

}  // namespace mghf
