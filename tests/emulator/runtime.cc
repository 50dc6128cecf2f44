// SPDX-License-Identifier: Apache-2.0
//
// The CUDA runtime of the emulator: one device of compute capability 9.0 whose memory is the host's.
//
// Why:     each allocation ends (to 256 bytes) at a page that may not be touched, so that a kernel
//          that reads or writes beyond it stops there.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "tests/emulator/driver_memory.h"
#include "tests/emulator/emulator.h"
#include "tests/emulator/stream.h"
#include "tests/emulator/tensor_map.h"

namespace strait::emulator {
namespace {

constexpr int kMultiprocessors = 4;  // few: plans then give each several pieces of work
constexpr size_t kMemoryBytes = size_t{64} << 30;  // of addresses; pages come when touched
constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 256;

struct Allocation {
  void* mapping;
  size_t mapped_bytes;
  size_t bytes;
};

// Whether `at` lies in one of the allocations, by their first addresses.
template <class Map, class Bytes>
bool Holds(const Map& allocations, const void* at, Bytes bytes_of) {
  auto after = allocations.upper_bound(const_cast<void*>(at));
  if (after == allocations.begin()) return false;
  const auto& [begin, allocation] = *--after;
  return at < static_cast<const char*>(begin) + bytes_of(allocation);
}

std::mutex mutex;
std::map<void*, Allocation>& Allocations() {
  static std::map<void*, Allocation> allocations;
  return allocations;
}
std::map<void*, size_t>& HostAllocations() {
  static std::map<void*, size_t> allocations;  // guarded by mutex
  return allocations;
}
size_t used_bytes = 0;
std::set<CUstream_st*>& Streams() {
  static std::set<CUstream_st*> streams;  // guarded by mutex
  return streams;
}

void DoAllStreams() {
  std::vector<std::shared_ptr<StreamQueue>> queues;
  {
    const std::lock_guard lock(mutex);
    for (const CUstream_st* stream : Streams()) queues.push_back(stream->queue);
  }
  for (const auto& queue : queues) queue->DoAll();
}

CUresult EncodeTiled(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* base,
                     const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                     const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                     CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                     CUtensorMapFloatOOBfill fill) {
  TensorMap map = {};
  map.element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2
                      : type == CU_TENSOR_MAP_DATA_TYPE_UINT8  ? 1
                                                               : 0;
  const bool known_swizzle =
      swizzle == CU_TENSOR_MAP_SWIZZLE_128B || swizzle == CU_TENSOR_MAP_SWIZZLE_NONE;
  if (map.element_bytes == 0 || rank < 1 || rank > 5 || !known_swizzle ||
      interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE ||
      reinterpret_cast<uintptr_t>(base) % 16 != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  map.base = static_cast<const unsigned char*>(base);
  map.rank = rank;
  map.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 1 : 0;
  for (cuuint32_t i = 0; i < rank; ++i) {
    map.sizes[i] = static_cast<uint32_t>(sizes[i]);
    map.box[i] = box[i];
    if (sizes[i] == 0 || box[i] == 0 || box[i] > 256 || element_strides[i] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    if (i == 0) continue;
    map.strides[i - 1] = strides[i - 1];
    if (strides[i - 1] % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  }
  const uint32_t inner_bytes = box[0] * map.element_bytes;
  if (inner_bytes % 16 != 0 || (map.swizzled != 0 && inner_bytes > 128)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::memcpy(to, &map, sizeof(map));
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace strait::emulator

using strait::emulator::Enqueue;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "Strait's emulator");
  properties->major = 9;
  properties->multiProcessorCount = strait::emulator::kMultiprocessors;
  properties->totalGlobalMem = strait::emulator::kMemoryBytes;
  properties->l2CacheSize = 1 << 20;
  properties->sharedMemPerBlockOptin = 227 << 10;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = strait::emulator::kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 << 10;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 1 << 20;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize
             ? strait::emulator::SetSharedLimit(kernel, value)
             : cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                           const cudaLaunchConfig_t* config) {
  unsigned blocks = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      blocks = config->attrs[i].val.clusterDim.x;
    }
  }
  *clusters = strait::emulator::kMultiprocessors / static_cast<int>(blocks);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  const std::lock_guard lock(strait::emulator::mutex);
  *total_bytes = strait::emulator::kMemoryBytes;
  *free_bytes =
      strait::emulator::kMemoryBytes - strait::emulator::used_bytes - strait::emulator::SlabBytes();
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() {
  strait::emulator::DoAllStreams();
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the emulator's runtime";
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorOfEmulator";
}

cudaError_t cudaMalloc(void** to, size_t bytes) {
  using namespace strait::emulator;  // NOLINT: its own parts
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const size_t pages = (rounded + kPage - 1) / kPage * kPage;
  const std::lock_guard lock(mutex);
  if (used_bytes + rounded > kMemoryBytes) return cudaErrorMemoryAllocation;
  void* const mapping = mmap(nullptr, pages + kPage, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return cudaErrorMemoryAllocation;
  mprotect(static_cast<char*>(mapping) + pages, kPage, PROT_NONE);
  *to = static_cast<char*>(mapping) + (pages - rounded);
  Allocations()[*to] = {mapping, pages + kPage, rounded};
  used_bytes += rounded;
  return cudaSuccess;
}
cudaError_t cudaFree(void* from) {
  using namespace strait::emulator;  // NOLINT: its own parts
  if (from == nullptr) return cudaSuccess;
  DoAllStreams();
  const std::lock_guard lock(mutex);
  const auto found = Allocations().find(from);
  if (found == Allocations().end()) return cudaErrorInvalidValue;
  munmap(found->second.mapping, found->second.mapped_bytes);
  used_bytes -= found->second.bytes;
  Allocations().erase(found);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned) {
  *to = ::operator new (bytes, std::align_val_t{256});
  const std::lock_guard lock(strait::emulator::mutex);
  strait::emulator::HostAllocations()[*to] = bytes;
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* at, size_t bytes, unsigned) {
  const std::lock_guard lock(strait::emulator::mutex);
  strait::emulator::HostAllocations()[at] = bytes;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* at) {
  const std::lock_guard lock(strait::emulator::mutex);
  return strait::emulator::HostAllocations().erase(at) > 0 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* at) {
  using namespace strait::emulator;  // NOLINT: its own parts
  *attributes = {};
  const std::lock_guard lock(mutex);
  attributes->type =
      IsMappedSlab(at) || Holds(Allocations(), at, [](const Allocation& a) { return a.bytes; })
          ? cudaMemoryTypeDevice
      : Holds(HostAllocations(), at, [](size_t bytes) { return bytes; })
          ? cudaMemoryTypeHost
          : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* from) {
  {
    const std::lock_guard lock(strait::emulator::mutex);
    strait::emulator::HostAllocations().erase(from);
  }
  ::operator delete (from, std::align_val_t{256});
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return Enqueue(stream, [=] { std::memcpy(to, from, bytes); });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return Enqueue(stream, [=] { std::memset(to, value, bytes); });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  const std::lock_guard lock(strait::emulator::mutex);
  strait::emulator::Streams().insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  stream->queue->DoAll();
  {
    const std::lock_guard lock(strait::emulator::mutex);
    strait::emulator::Streams().erase(stream);
  }
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream == nullptr) return cudaSuccess;
  if (stream->capturing != nullptr) return cudaErrorStreamCaptureUnsupported;
  stream->queue->DoAll();
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (stream != nullptr && stream->capturing != nullptr) return cudaErrorStreamCaptureUnsupported;
  // What the event stands for now, whatever it is recorded for later.
  return Enqueue(stream, [recorded = *event] {
    if (recorded.queue) recorded.queue->Do(recorded.until, UINT64_MAX);
  });
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return Enqueue(stream, [=] { function(data); });
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (stream != nullptr && stream->capturing != nullptr) return cudaErrorStreamCaptureUnsupported;
  *event = {};
  if (stream != nullptr) *event = {stream->queue, stream->queue->added()};
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event->queue) event->queue->Do(event->until, UINT64_MAX);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (!event->queue || event->queue->Do(event->until, 1)) return cudaSuccess;
  return cudaErrorNotReady;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr || stream->capturing != nullptr) return cudaErrorStreamCaptureUnsupported;
  stream->capturing = new CUgraph_st;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = stream->capturing;
  stream->capturing = nullptr;
  return *graph != nullptr ? cudaSuccess : cudaErrorStreamCaptureInvalidated;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* ready, cudaGraph_t graph, unsigned long long) {
  *ready = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  return Enqueue(stream, [graph] {
    for (const auto& work : graph->work) work();
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** entry, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *entry = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0
               ? reinterpret_cast<void*>(&strait::emulator::EncodeTiled)
               : strait::emulator::FindDriverMemory(symbol);
  const bool known = *entry != nullptr;
  if (found != nullptr) {
    *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return cudaSuccess;
}

}  // extern "C"
