// SPDX-License-Identifier: Apache-2.0
//
// What a process must know of its GPU before it computes, and why it cannot where it cannot.
//
// Thread:  any.
// Errors:  as text for people; empty: none. The first CUDA call of a process is made here.
#pragma once

#include <cstdint>
#include <string>

namespace strait::cuda {

struct Device {
  int index = 0;
  std::string name;
  int compute_capability = 0;  // 90: 9.0
  int num_multiprocessors = 0;
  int64_t l2_bytes = 0;
  int64_t memory_bytes = 0;  // of the GPU
  int64_t free_bytes = 0;    // now
};

// Picks GPU `index` for the calling thread and fills `device`. Returns what is wrong: no driver, a
// driver older than this build, no GPU, one that this build has no code for.
std::string OpenDevice(int index, Device* device);

}  // namespace strait::cuda
