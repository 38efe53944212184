#include "host.h"

namespace mghf::host {

Block::Block(int threads, size_t shared_bytes)
    : all(threads), exchanged(threads), shared(new unsigned char[shared_bytes]) {
  for (int first = 0; first < threads; first += kWarp) {
    warps.push_back(std::make_unique<std::barrier<>>(std::min(kWarp, threads - first)));
  }
}

void run(unsigned blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  Block shared(threads, shared_bytes);
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i) {
    pool.emplace_back([&, i] {
      block = &shared;
      thread_index.x = static_cast<unsigned>(i);
      block_size.x = static_cast<unsigned>(threads);
      grid_size.x = blocks;
      for (unsigned b = 0; b < blocks; ++b) {
        block_index.x = b;
        kernel();
        shared.all.arrive_and_wait();  // the next block has the same shared memory
      }
    });
  }
  for (auto& thread : pool) thread.join();
}

}  // namespace mghf::host
