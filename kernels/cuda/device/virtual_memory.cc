// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/device/virtual_memory.h"

#include <cstdint>

#include "kernels/cuda/device/driver_entry.h"

namespace strait::cuda {
namespace {

struct Driver {
  decltype(&cuMemGetAllocationGranularity) granularity =
      STRAIT_DRIVER_ENTRY(cuMemGetAllocationGranularity, 10020);
  decltype(&cuMemCreate) create = STRAIT_DRIVER_ENTRY(cuMemCreate, 10020);
  decltype(&cuMemRelease) release = STRAIT_DRIVER_ENTRY(cuMemRelease, 10020);
  decltype(&cuMemAddressReserve) reserve = STRAIT_DRIVER_ENTRY(cuMemAddressReserve, 10020);
  decltype(&cuMemAddressFree) free = STRAIT_DRIVER_ENTRY(cuMemAddressFree, 10020);
  decltype(&cuMemMap) map = STRAIT_DRIVER_ENTRY(cuMemMap, 10020);
  decltype(&cuMemUnmap) unmap = STRAIT_DRIVER_ENTRY(cuMemUnmap, 10020);
  decltype(&cuMemSetAccess) set_access = STRAIT_DRIVER_ENTRY(cuMemSetAccess, 10020);
  bool complete() const {
    return granularity != nullptr && create != nullptr && release != nullptr &&
           reserve != nullptr && free != nullptr && map != nullptr && unmap != nullptr &&
           set_access != nullptr;
  }
};

// Null: the driver lacks something.
const Driver* FindDriver() {
  static const Driver driver;
  return driver.complete() ? &driver : nullptr;
}

cudaError_t ErrorOf(CUresult result) {
  switch (result) {
    case CUDA_SUCCESS:
      return cudaSuccess;
    case CUDA_ERROR_OUT_OF_MEMORY:
      return cudaErrorMemoryAllocation;
    case CUDA_ERROR_INVALID_VALUE:
      return cudaErrorInvalidValue;
    default:
      return cudaErrorUnknown;
  }
}

CUmemAllocationProp Properties(int device) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  return properties;
}

// The driver wants a context; the runtime makes one when it is asked for anything.
const Driver* Ready(int device) {
  if (cudaSetDevice(device) != cudaSuccess || cudaFree(nullptr) != cudaSuccess) return nullptr;
  return FindDriver();
}

}  // namespace

cudaError_t SlabGranularity(int device, size_t* bytes) {
  const Driver* const driver = Ready(device);
  if (driver == nullptr) return cudaErrorSymbolNotFound;
  const CUmemAllocationProp properties = Properties(device);
  return ErrorOf(driver->granularity(bytes, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
}

cudaError_t CreateSlab(int device, size_t bytes, Slab* slab) {
  const Driver* const driver = FindDriver();
  if (driver == nullptr) return cudaErrorSymbolNotFound;
  const CUmemAllocationProp properties = Properties(device);
  return ErrorOf(driver->create(slab, bytes, &properties, 0));
}

cudaError_t ReleaseSlab(Slab slab) {
  const Driver* const driver = FindDriver();
  if (driver == nullptr) return cudaErrorSymbolNotFound;
  return ErrorOf(driver->release(slab));
}

cudaError_t ReserveAddresses(size_t bytes, std::byte** at) {
  const Driver* const driver = FindDriver();
  if (driver == nullptr) return cudaErrorSymbolNotFound;
  CUdeviceptr address = 0;
  const CUresult result = driver->reserve(&address, bytes, 0, 0, 0);
  *at = reinterpret_cast<std::byte*>(static_cast<uintptr_t>(address));
  return ErrorOf(result);
}

cudaError_t FreeAddresses(std::byte* at, size_t bytes) {
  const Driver* const driver = FindDriver();
  if (driver == nullptr) return cudaErrorSymbolNotFound;
  return ErrorOf(driver->free(reinterpret_cast<CUdeviceptr>(at), bytes));
}

cudaError_t MapSlab(std::byte* at, size_t bytes, Slab slab, int device) {
  const Driver* const driver = FindDriver();
  if (driver == nullptr) return cudaErrorSymbolNotFound;
  const auto address = reinterpret_cast<CUdeviceptr>(at);
  if (const CUresult mapped = driver->map(address, bytes, 0, slab, 0); mapped != CUDA_SUCCESS) {
    return ErrorOf(mapped);
  }
  CUmemAccessDesc access = {};
  access.location = Properties(device).location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  const CUresult allowed = driver->set_access(address, bytes, &access, 1);
  if (allowed != CUDA_SUCCESS) (void)driver->unmap(address, bytes);
  return ErrorOf(allowed);
}

cudaError_t UnmapSlabs(std::byte* at, size_t bytes) {
  const Driver* const driver = FindDriver();
  if (driver == nullptr) return cudaErrorSymbolNotFound;
  return ErrorOf(driver->unmap(reinterpret_cast<CUdeviceptr>(at), bytes));
}

}  // namespace strait::cuda
