// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/device/device.h"

#include <cuda_runtime_api.h>

#include <cstdlib>

namespace strait::cuda {

// In device_probe.cu: whether this build has code for the current GPU.
cudaError_t ProbeKernel();

namespace {

std::string Version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string Capability(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

}  // namespace

std::string WhyUnusable(const DriverFacts& f) {
  if (f.driver_version == 0) {
    return "there is no NVIDIA driver on this machine (or it is not visible in this container)";
  }
  const int least = f.runtime_version / 1000 * 1000;  // a driver runs all of its major version
  if (f.driver_version < least) {
    return "the NVIDIA driver is too old: it supports CUDA " + Version(f.driver_version) +
           ", this build needs " + Version(least) + " or newer; update the driver";
  }
  if (!f.start_error.empty()) return "CUDA does not start: " + f.start_error;
  if (f.num_gpus == 0) {
    return "there is no NVIDIA GPU on this machine (or CUDA_VISIBLE_DEVICES hides it)";
  }
  if (f.index < 0 || f.index >= f.num_gpus) {
    return "there is no GPU " + std::to_string(f.index) + ": this machine has " +
           std::to_string(f.num_gpus) +
           (f.num_gpus == 1 ? ", number 0" : ", numbers 0 to " + std::to_string(f.num_gpus - 1)) +
           "; see --gpu and CUDA_VISIBLE_DEVICES";
  }
  if (!f.use_error.empty()) {
    return "GPU " + std::to_string(f.index) + " cannot be used: " + f.use_error;
  }
  const Device& d = f.device;
  if (d.compute_capability < kMinComputeCapability) {
    return d.name + " has compute capability " + Capability(d.compute_capability) +
           ", the kernels need " + Capability(kMinComputeCapability) + " or newer";
  }
  if (!f.probe_error.empty()) {
    return d.name + " has compute capability " + Capability(d.compute_capability) +
           ", this build has code for " + f.build_archs + " only (" + f.probe_error +
           "); build with -DSTRAIT_CUDA_ARCHITECTURES=" + std::to_string(d.compute_capability);
  }
  return "";
}

DriverFacts LookAtDevice(int index) {
  // Kernels' code is loaded now and not at their first launch: a step takes no memory.
  (void)setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  DriverFacts f;
  f.index = index;
  f.runtime_version = CUDART_VERSION;
  f.build_archs = STRAIT_CUDA_ARCHS;
  if (cudaDriverGetVersion(&f.driver_version) != cudaSuccess) f.driver_version = 0;
  if (f.driver_version < f.runtime_version / 1000 * 1000) return f;
  cudaError_t error = cudaGetDeviceCount(&f.num_gpus);
  if (error != cudaSuccess) f.num_gpus = 0;
  if (error != cudaSuccess && error != cudaErrorNoDevice) f.start_error = cudaGetErrorString(error);
  if (index < 0 || index >= f.num_gpus) return f;
  cudaDeviceProp properties;
  size_t free = 0;
  size_t total = 0;
  error = cudaSetDevice(index);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, index);
  if (error == cudaSuccess) error = cudaMemGetInfo(&free, &total);
  if (error != cudaSuccess) {
    f.use_error = cudaGetErrorString(error);
    return f;
  }
  f.device.index = index;
  f.device.name = properties.name;
  f.device.compute_capability = properties.major * 10 + properties.minor;
  f.device.num_multiprocessors = properties.multiProcessorCount;
  f.device.l2_bytes = properties.l2CacheSize;
  f.device.shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  f.device.memory_bytes = static_cast<int64_t>(total);
  f.device.free_bytes = static_cast<int64_t>(free);
  error = ProbeKernel();
  if (error != cudaSuccess) f.probe_error = cudaGetErrorString(error);
  return f;
}

std::string OpenDevice(int index, Device* device) {
  const DriverFacts facts = LookAtDevice(index);
  std::string problem = WhyUnusable(facts);
  if (problem.empty()) *device = facts.device;
  return problem;
}

int ComputeCapabilityMajor() {
  static const int major = [] {
    int device = 0;
    int value = 0;
    const bool known =
        cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess;
    return known ? value : 0;
  }();
  return major;
}

}  // namespace strait::cuda
