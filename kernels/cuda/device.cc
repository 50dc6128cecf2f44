// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/device.h"

#include <cuda_runtime_api.h>

namespace strait::cuda {

// In device_probe.cu: whether this build has code for the current GPU.
cudaError_t ProbeKernel();

namespace {

std::string Version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string OpenDevice(int index, Device* device) {
  int driver = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess || driver == 0) {
    return "there is no NVIDIA driver on this machine (or it is not visible in this container)";
  }
  constexpr int kMajor = CUDART_VERSION / 1000 * 1000;
  if (driver < kMajor) {
    return "the NVIDIA driver is too old: it supports CUDA " + Version(driver) +
           ", this build needs " + Version(kMajor) + " or newer; update the driver";
  }
  int count = 0;
  error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    return "there is no NVIDIA GPU on this machine (or CUDA_VISIBLE_DEVICES hides it)";
  }
  if (error != cudaSuccess) {
    return std::string("CUDA does not start: ") + cudaGetErrorString(error);
  }
  if (index < 0 || index >= count) {
    return "there is no GPU " + std::to_string(index) + ": this machine has " +
           std::to_string(count);
  }
  cudaDeviceProp properties;
  size_t free = 0;
  size_t total = 0;
  error = cudaSetDevice(index);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, index);
  if (error == cudaSuccess) error = cudaMemGetInfo(&free, &total);
  if (error != cudaSuccess) {
    return "GPU " + std::to_string(index) + " cannot be used: " + cudaGetErrorString(error);
  }
  device->index = index;
  device->name = properties.name;
  device->compute_capability = properties.major * 10 + properties.minor;
  device->num_multiprocessors = properties.multiProcessorCount;
  device->l2_bytes = properties.l2CacheSize;
  device->memory_bytes = static_cast<int64_t>(total);
  device->free_bytes = static_cast<int64_t>(free);
  error = ProbeKernel();
  if (error != cudaSuccess) {
    return device->name + " has compute capability " + std::to_string(properties.major) + "." +
           std::to_string(properties.minor) +
           ", this build has code for " STRAIT_CUDA_ARCHS " only (" + cudaGetErrorString(error) +
           "); build with -DSTRAIT_CUDA_ARCHITECTURES=" +
           std::to_string(device->compute_capability);
  }
  return "";
}

}  // namespace strait::cuda
