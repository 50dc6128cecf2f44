// SPDX-License-Identifier: Apache-2.0
//
// Physical slabs of device memory, and ranges of addresses that they are mapped into: the driver's
// virtual memory management, without linking to the driver.
//
// Owns:    nothing: the caller gives back what it took.
// Thread:  any.
// Errors:  cudaErrorSymbolNotFound: the driver has none of it; cudaErrorMemoryAllocation: no memory, or
//          no addresses; cudaErrorInvalidValue: what is no multiple of the granularity.
// Why:     whoever needs memory later gets it at addresses that follow each other, from slabs that lie
//          anywhere: so nothing that was freed is too scattered to be of use.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace strait::cuda {

using Slab = unsigned long long;  // NOLINT: the driver's type of a handle

// What sizes and addresses are multiples of.
cudaError_t SlabGranularity(int device, size_t* bytes);
cudaError_t CreateSlab(int device, size_t bytes, Slab* slab);
// Its memory is free when it is mapped nowhere any more.
cudaError_t ReleaseSlab(Slab slab);

cudaError_t ReserveAddresses(size_t bytes, std::byte** at);
// REQUIRES: nothing is mapped there.
cudaError_t FreeAddresses(std::byte* at, size_t bytes);

// The whole slab, for the device to read and write.
cudaError_t MapSlab(std::byte* at, size_t bytes, Slab slab, int device);
// REQUIRES: whole slabs; the device is done with them.
cudaError_t UnmapSlabs(std::byte* at, size_t bytes);

}  // namespace strait::cuda
