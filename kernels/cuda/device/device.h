// SPDX-License-Identifier: Apache-2.0
//
// What a process must know of its GPU before it computes, and why it cannot where it cannot.
//
// Thread:  any.
// Errors:  as text for people; empty: none. The first CUDA call of a process is made here.
// Why:     what is found and what is made of it are apart, so that the words for machines that
//          nobody has at hand are tested.
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
  int64_t shared_bytes = 0;  // that a thread block may have
  int64_t memory_bytes = 0;  // of the GPU
  int64_t free_bytes = 0;    // now
};

// What the driver says of a machine and of its GPU `index`. Found in this order; what comes after
// a failure is not looked at.
struct DriverFacts {
  int driver_version = 0;   // newest CUDA that the driver knows, 12040: 12.4; 0: no driver
  int runtime_version = 0;  // CUDA of this build
  int num_gpus = 0;
  std::string start_error;  // why CUDA does not start; empty: it does
  int index = 0;            // the GPU that is wanted
  std::string use_error;    // why that one cannot be used
  Device device;
  std::string probe_error;  // why a kernel of this build does not run there
  std::string build_archs;  // that this build has code for: "sm_90a, sm_100"
};

inline constexpr int kMinComputeCapability = 80;  // bf16 products, asynchronous copies

// Why the GPU cannot be used, and what to do; empty: it can.
std::string WhyUnusable(const DriverFacts& facts);

// Asks the driver. Picks GPU `index` for the calling thread if it is there.
DriverFacts LookAtDevice(int index);

// Both: fills `device`, or returns what is wrong.
std::string OpenDevice(int index, Device* device);

// Major compute capability of the device that was current at the first call; 0 without one.
int ComputeCapabilityMajor();

}  // namespace strait::cuda
