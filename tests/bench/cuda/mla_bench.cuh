// SPDX-License-Identifier: Apache-2.0
//
// What the parts of mla_bench.cu share: memory, random values, replays of a graph.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <utility>
#include <vector>

#include "kernels/cuda/attention/mla.h"

namespace strait::cuda {

inline void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
T* Allocate(int64_t count) {
  void* data = nullptr;
  Check(cudaMalloc(&data, static_cast<size_t>(count) * sizeof(T)), "device memory");
  return static_cast<T*>(data);
}

template <class T>
T* Upload(const std::vector<T>& from) {
  T* to = Allocate<T>(static_cast<int64_t>(from.size()));
  Check(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  return to;
}

inline __device__ uint32_t Hash(uint64_t x) {
  x = (x ^ (x >> 31)) * 0x7fb5d329728ea185ull;
  x = (x ^ (x >> 27)) * 0x81dadef4bc2dd44dull;
  return static_cast<uint32_t>(x ^ (x >> 33));
}

// Values in (-1, 1), of random sign and size.
inline __device__ __nv_bfloat16 RandomBf16(uint64_t at) {
  return __float2bfloat16(static_cast<float>(static_cast<int32_t>(Hash(at))) * 0x1p-31f * 1.7f);
}

static __global__ void FillBf16(__nv_bfloat16* to, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    to[i] = RandomBf16(static_cast<uint64_t>(i));
  }
}

// fp8 rows of 512 + 64 columns, none NaN.
static __global__ void FillFp8Rows(std::byte* to, int64_t rows) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    std::byte* at = to + row * 656;
    for (int i = threadIdx.x; i < 512; i += blockDim.x) {
      const uint32_t code = Hash(static_cast<uint64_t>(row * 512 + i));
      at[i] = static_cast<std::byte>((code & 0x7f) > 0x70 ? code & 0xbf : code & 0xff);
    }
    if (threadIdx.x < 4) reinterpret_cast<float*>(at + 512)[threadIdx.x] = 0.004f;
    for (int i = threadIdx.x; i < 64; i += blockDim.x) {
      reinterpret_cast<__nv_bfloat16*>(at + 528)[i] = RandomBf16(static_cast<uint64_t>(~row * i));
    }
  }
}

// `launch(i, stream)` for i < launches, warmed up and captured once, to be replayed.
class Replay {
 public:
  template <class Launch>
  Replay(int launches, const Launch& launch) : launches_(launches) {
    Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
    for (int i = 0; i < launches; ++i) launch(i, stream_);
    Check(cudaStreamSynchronize(stream_), "warm-up");
    cudaGraph_t graph;
    Check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < launches; ++i) launch(i, stream_);
    Check(cudaStreamEndCapture(stream_, &graph), "capture");
    Check(cudaGraphInstantiate(&exec_, graph, 0), "graph");
    Check(cudaGraphDestroy(graph), "graph");
    Check(cudaEventCreate(&begin_), "event");
    Check(cudaEventCreate(&end_), "event");
    Check(cudaGraphLaunch(exec_, stream_), "replay");
    Check(cudaStreamSynchronize(stream_), "replay");
  }
  ~Replay() {
    Check(cudaGraphExecDestroy(exec_), "graph");
    Check(cudaEventDestroy(begin_), "event");
    Check(cudaEventDestroy(end_), "event");
    Check(cudaStreamDestroy(stream_), "stream");
  }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  // Microseconds of a launch.
  double Time() {
    Check(cudaEventRecord(begin_, stream_), "event");
    Check(cudaGraphLaunch(exec_, stream_), "replay");
    Check(cudaEventRecord(end_, stream_), "event");
    Check(cudaEventSynchronize(end_), "replay");
    float ms = 0;
    Check(cudaEventElapsedTime(&ms, begin_, end_), "event");
    return ms * 1000.0 / launches_;
  }

 private:
  const int launches_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

inline double MedianOf(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Median microseconds of a launch over the replays.
template <class Launch>
double Median(int launches, int replays, const Launch& launch) {
  Replay replay(launches, launch);
  std::vector<double> times;
  for (int i = 0; i < replays; ++i) times.push_back(replay.Time());
  return MedianOf(std::move(times));
}

struct Size {
  int32_t heads;
  int32_t batch;
  int32_t length;
  int32_t new_tokens = 1;
};

struct Device {
  int32_t multiprocessors = 0;
  int32_t l2_bytes = 0;
  double read_gb_per_s = 0;
  char name[256] = {};
};

// What a launch needs besides the cache: the plan of a batch whose sequences end at `size.length` rows,
// random queries, room for results. params: all but blocks, segments, map, format and path.
class Attention {
 public:
  Attention(const Size& size, const Device& device, bool deterministic) {
    std::vector<MlaSequence> sequences;
    for (int32_t s = 0; s < size.batch; ++s) {
      const int32_t before = size.length - size.new_tokens;
      sequences.push_back({s, s * size.new_tokens, size.new_tokens, before, -1, before});
    }
    const int32_t tokens = size.batch * size.new_tokens;
    const MlaPlanLimits limits = MaxMlaPlan(device.multiprocessors, size.batch, tokens, size.heads,
                                            size.length, deterministic);
    MlaPlan plan;
    if (!PlanMla(sequences.data(), size.batch,
                 {.num_heads = size.heads, .deterministic = deterministic}, limits, &plan)) {
      std::fprintf(stderr, "no plan\n");
      std::exit(1);
    }
    std::vector<std::byte> plan_bytes(static_cast<size_t>(MlaPlanBytes(limits)));
    WriteMlaPlan(plan, plan_bytes.data());
    plan_ = Upload(plan_bytes);
    rows = int64_t{tokens} * size.heads;
    q = Allocate<__nv_bfloat16>(rows * 576);
    FillBf16<<<1024, 256>>>(q, rows * 576);
    out = Allocate<__nv_bfloat16>(rows * 512);
    params.q_latent = q;
    params.q_rope = q + 512;
    params.q_latent_stride = params.q_rope_stride = 576;
    params.plan = ViewMlaPlan(limits, plan_);
    params.partial_out = Allocate<float>(std::max(1, plan.num_partials) * int64_t{64} * 512);
    params.partial_lse = Allocate<float>(std::max(1, plan.num_partials) * int64_t{64});
    params.out = out;
    params.lse = Allocate<float>(rows);
    params.softmax_scale = 0.1f;
    params.num_heads = size.heads;
    params.rank = 512;
    params.rope = 64;
  }
  ~Attention() {
    for (void* memory : std::initializer_list<void*>{plan_, q, out, params.lse, params.partial_out,
                                                     params.partial_lse}) {
      Check(cudaFree(memory), "free");
    }
  }
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;

  MlaParams params;
  int64_t rows = 0;              // of queries: tokens times heads
  __nv_bfloat16* q = nullptr;    // [rows, 576]
  __nv_bfloat16* out = nullptr;  // [rows, 512]

 private:
  std::byte* plan_ = nullptr;
};

}  // namespace strait::cuda
