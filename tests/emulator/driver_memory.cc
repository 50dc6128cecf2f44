// SPDX-License-Identifier: Apache-2.0
#include "tests/emulator/driver_memory.h"

#include <cuda.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string_view>

namespace strait::emulator {
namespace {

constexpr size_t kMaxBytes = size_t{64} << 30;
constexpr size_t kGranularity = size_t{64} << 10;  // small: tests have little memory

struct SlabPlace {
  off_t offset = 0;
  size_t bytes = 0;
  int num_mapped = 0;
  bool released = false;
};
struct Mapped {
  size_t bytes = 0;
  unsigned long long slab = 0;  // NOLINT: the driver's type
};

std::mutex mutex;
// All guarded by mutex.
std::map<unsigned long long, SlabPlace>& Slabs() {       // NOLINT
  static std::map<unsigned long long, SlabPlace> slabs;  // NOLINT
  return slabs;
}
std::map<uintptr_t, Mapped>& Mappings() {
  static std::map<uintptr_t, Mapped> mappings;
  return mappings;
}
std::map<uintptr_t, size_t>& Reserved() {
  static std::map<uintptr_t, size_t> reserved;
  return reserved;
}
size_t slab_bytes = 0;
off_t file_end = 0;
unsigned long long last_slab = 0;  // NOLINT

int File() {
  static const int file = memfd_create("slabs", 0);
  return file;
}

// Frees the memory of a slab that nobody has any more.
void Settle(std::map<unsigned long long, SlabPlace>::iterator it) {  // NOLINT
  if (!it->second.released || it->second.num_mapped > 0) return;
  (void)fallocate(File(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, it->second.offset,
                  static_cast<off_t>(it->second.bytes));
  slab_bytes -= it->second.bytes;
  Slabs().erase(it);
}

CUresult Granularity(size_t* bytes, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *bytes = kGranularity;
  return CUDA_SUCCESS;
}

CUresult Create(CUmemGenericAllocationHandle* slab, size_t bytes, const CUmemAllocationProp*,
                unsigned long long) {  // NOLINT
  const std::lock_guard lock(mutex);
  if (bytes == 0 || bytes % kGranularity != 0) return CUDA_ERROR_INVALID_VALUE;
  if (slab_bytes + bytes > kMaxBytes) return CUDA_ERROR_OUT_OF_MEMORY;
  if (ftruncate(File(), file_end + static_cast<off_t>(bytes)) != 0) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  *slab = ++last_slab;
  Slabs()[*slab] = {.offset = file_end, .bytes = bytes};
  file_end += static_cast<off_t>(bytes);
  slab_bytes += bytes;
  return CUDA_SUCCESS;
}

CUresult Release(CUmemGenericAllocationHandle slab) {
  const std::lock_guard lock(mutex);
  const auto it = Slabs().find(slab);
  if (it == Slabs().end() || it->second.released) return CUDA_ERROR_INVALID_VALUE;
  it->second.released = true;
  Settle(it);
  return CUDA_SUCCESS;
}

CUresult Reserve(CUdeviceptr* at, size_t bytes, size_t, CUdeviceptr,
                 unsigned long long) {  // NOLINT
  const std::lock_guard lock(mutex);
  if (bytes == 0 || bytes % kGranularity != 0) return CUDA_ERROR_INVALID_VALUE;
  void* const addresses =
      mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (addresses == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  *at = reinterpret_cast<CUdeviceptr>(addresses);
  Reserved()[static_cast<uintptr_t>(*at)] = bytes;
  return CUDA_SUCCESS;
}

CUresult Free(CUdeviceptr at, size_t bytes) {
  const std::lock_guard lock(mutex);
  const auto it = Reserved().find(static_cast<uintptr_t>(at));
  if (it == Reserved().end() || it->second != bytes) return CUDA_ERROR_INVALID_VALUE;
  const auto mapped = Mappings().lower_bound(static_cast<uintptr_t>(at));
  if (mapped != Mappings().end() && mapped->first < at + bytes) return CUDA_ERROR_INVALID_VALUE;
  munmap(reinterpret_cast<void*>(at), bytes);
  Reserved().erase(it);
  return CUDA_SUCCESS;
}

CUresult Map(CUdeviceptr at, size_t bytes, size_t offset, CUmemGenericAllocationHandle slab,
             unsigned long long) {  // NOLINT
  const std::lock_guard lock(mutex);
  const auto it = Slabs().find(slab);
  auto range = Reserved().upper_bound(static_cast<uintptr_t>(at));
  if (it == Slabs().end() || offset != 0 || bytes != it->second.bytes ||
      range == Reserved().begin() || Mappings().count(static_cast<uintptr_t>(at)) > 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  --range;
  if (at + bytes > range->first + range->second) return CUDA_ERROR_INVALID_VALUE;
  // Not to be touched before SetAccess.
  if (mmap(reinterpret_cast<void*>(at), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, File(),
           it->second.offset) == MAP_FAILED) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  Mappings()[static_cast<uintptr_t>(at)] = {bytes, slab};
  ++it->second.num_mapped;
  return CUDA_SUCCESS;
}

CUresult SetAccess(CUdeviceptr at, size_t bytes, const CUmemAccessDesc*, size_t) {
  return mprotect(reinterpret_cast<void*>(at), bytes, PROT_READ | PROT_WRITE) == 0
             ? CUDA_SUCCESS
             : CUDA_ERROR_INVALID_VALUE;
}

CUresult Unmap(CUdeviceptr at, size_t bytes) {
  const std::lock_guard lock(mutex);
  auto it = Mappings().find(static_cast<uintptr_t>(at));
  for (size_t done = 0; done < bytes;) {
    if (it == Mappings().end() || it->first != at + done || done + it->second.bytes > bytes) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    done += it->second.bytes;
    const auto slab = Slabs().find(it->second.slab);
    --slab->second.num_mapped;
    Settle(slab);
    it = Mappings().erase(it);
  }
  (void)mmap(reinterpret_cast<void*>(at), bytes, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return CUDA_SUCCESS;
}

}  // namespace

void* FindDriverMemory(const char* symbol) {
  static const std::map<std::string_view, void*> functions = {
      {"cuMemGetAllocationGranularity", reinterpret_cast<void*>(&Granularity)},
      {"cuMemCreate", reinterpret_cast<void*>(&Create)},
      {"cuMemRelease", reinterpret_cast<void*>(&Release)},
      {"cuMemAddressReserve", reinterpret_cast<void*>(&Reserve)},
      {"cuMemAddressFree", reinterpret_cast<void*>(&Free)},
      {"cuMemMap", reinterpret_cast<void*>(&Map)},
      {"cuMemSetAccess", reinterpret_cast<void*>(&SetAccess)},
      {"cuMemUnmap", reinterpret_cast<void*>(&Unmap)}};
  const auto it = functions.find(symbol);
  return it == functions.end() ? nullptr : it->second;
}

bool IsMappedSlab(const void* at) {
  const std::lock_guard lock(mutex);
  auto it = Mappings().upper_bound(reinterpret_cast<uintptr_t>(at));
  if (it == Mappings().begin()) return false;
  --it;
  return reinterpret_cast<uintptr_t>(at) < it->first + it->second.bytes;
}

size_t SlabBytes() {
  const std::lock_guard lock(mutex);
  return slab_bytes;
}

}  // namespace strait::emulator
