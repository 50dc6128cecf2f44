// SPDX-License-Identifier: Apache-2.0
//
// The emulator's streams and graphs: work is done when it is enqueued, or kept by a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <vector>

struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> work;
};
struct CUstream_st {
  CUgraph_st* capturing = nullptr;
};
struct CUevent_st {};
