// SPDX-License-Identifier: Apache-2.0
//
// What the GPU of this run can do at most, measured: the ceilings that shares are given of. And
// timing.
//
// Stream:  the legacy default one, which waits for all others.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace strait::bench {

inline void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Reads `bytes` once (read_rate.cu).
cudaError_t ReadAll(const void* data, size_t bytes, unsigned* sink, cudaStream_t stream);

// Median microseconds of run(i), each between events, after warm-up.
inline double MedianUs(const std::function<void(int)>& run, int repeats = 20, int warmups = 3) {
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  Check(cudaEventCreate(&begin), "event");
  Check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < warmups + repeats; ++i) {
    Check(cudaEventRecord(begin), "record");
    run(i);
    Check(cudaEventRecord(end), "record");
    Check(cudaEventSynchronize(end), "synchronize");
    float ms = 0;
    Check(cudaEventElapsedTime(&ms, begin, end), "elapsed");
    if (i >= warmups) times.push_back(ms * 1000);
  }
  Check(cudaEventDestroy(begin), "event");
  Check(cudaEventDestroy(end), "event");
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Median microseconds of one launch among many: `launches` calls of run(i, stream) are captured, and
// replayed, so that gaps between launches are those of a graph.
inline double GraphUs(const std::function<void(int, cudaStream_t)>& run, int launches = 20) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t ready = nullptr;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < launches; ++i) run(i, stream);
  Check(cudaStreamEndCapture(stream, &graph), "capture");
  Check(cudaGraphInstantiate(&ready, graph, 0), "instantiate");
  const double us = MedianUs([&](int) { Check(cudaGraphLaunch(ready, nullptr), "launch"); }, 9, 2);
  Check(cudaGraphExecDestroy(ready), "destroy");
  Check(cudaGraphDestroy(graph), "destroy");
  Check(cudaStreamDestroy(stream), "destroy");
  return us / launches;
}

// Flops a second of bf16 products whose operands stay in shared memory (matrix_rate.cu); 0: no
// Hopper.
double MatrixRate();

// Bytes a second of reading 1 GiB once.
inline double ReadRate() {
  constexpr size_t kBytes = size_t{1} << 30;
  void* data = nullptr;
  void* sink = nullptr;
  Check(cudaMalloc(&data, kBytes), "cudaMalloc");
  Check(cudaMalloc(&sink, 4), "cudaMalloc");
  Check(cudaMemset(data, 0x5a, kBytes), "cudaMemset");
  const double us = MedianUs(
      [&](int) { Check(ReadAll(data, kBytes, static_cast<unsigned*>(sink), nullptr), "read"); });
  Check(cudaFree(data), "cudaFree");
  Check(cudaFree(sink), "cudaFree");
  return static_cast<double>(kBytes) / us * 1e6;
}

}  // namespace strait::bench
