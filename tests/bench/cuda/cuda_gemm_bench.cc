// SPDX-License-Identifier: Apache-2.0
//
// cuda_gemm_bench: products of the model's shapes, weights rotated over more than twice the L2.
//
//   cuda_gemm_bench [--smoke]
//
// Prints shape, time, GB/s of weights and its share of the read rate, TFLOP/s and its share of the
// matrix rate, both rates measured in this run; then the same as a JSON line each. What goes
// through a Hopper kernel is measured through the portable one too, what clusters make also by single
// blocks with tiles of 256 and of 128 columns; and with fp8 weights with x as codes (W8A8), quantizing
// it included: the share is still of the rate of bf16, of which there is twice as much. Of products by
// clusters the time that a launch takes the host is said, in which it makes their tensor maps.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/cuda/device/device.h"
#include "kernels/cuda/gemm/gemm_internal.h"
#include "kernels/cuda/rowwise/quantize.h"
#include "tests/bench/cuda/limits.h"

namespace strait::bench {
namespace {

struct Shape {
  const char* name;
  int32_t rows, n, k;
  bool fp8, gated;
  int32_t experts;  // 0: dense; else rows choices spread over so many, each a tile of its own
};

constexpr Shape kShapes[] = {
    {"v2-lite o_proj", 1, 2048, 2048, false, false, 0},
    {"v2-lite q_proj", 1, 3072, 2048, false, false, 0},
    {"v2-lite dense up", 1, 10944, 2048, false, true, 0},
    {"v2-lite dense down", 1, 2048, 10944, false, false, 0},
    {"v2-lite head", 1, 102400, 2048, false, false, 0},
    {"v2-lite experts up", 6, 1408, 2048, false, true, 6},
    {"v2-lite experts down", 6, 2048, 1408, false, false, 6},
    {"v2-lite experts up, 64 tokens", 384, 1408, 2048, false, true, 64},
    {"v2-lite experts down, 64 tokens", 384, 2048, 1408, false, false, 64},
    {"v2-lite o_proj", 16, 2048, 2048, false, false, 0},
    {"v2-lite o_proj", 64, 2048, 2048, false, false, 0},
    {"v2-lite head", 64, 102400, 2048, false, false, 0},
    {"v2-lite o_proj", 256, 2048, 2048, false, false, 0},
    {"v2-lite q_proj", 2048, 3072, 2048, false, false, 0},
    {"v2-lite q_proj", 8192, 3072, 2048, false, false, 0},
    {"v2-lite o_proj", 8192, 2048, 2048, false, false, 0},
    {"v2-lite kv_a_proj", 8192, 576, 2048, false, false, 0},
    {"v2-lite dense up", 8192, 10944, 2048, false, true, 0},
    {"v2-lite experts up, 256 tokens", 1536, 1408, 2048, false, true, 64},
    {"v2-lite experts down, 256 tokens", 1536, 2048, 1408, false, false, 64},
    {"v2-lite experts up, 2048 tokens", 12288, 1408, 2048, false, true, 64},
    {"v2-lite experts down, 2048 tokens", 12288, 2048, 1408, false, false, 64},
    {"v2-lite o_proj", 2048, 2048, 2048, false, false, 0},
    {"v2-lite experts up, 8192 tokens", 49152, 1408, 2048, false, true, 64},
    {"v2-lite experts down, 8192 tokens", 49152, 2048, 1408, false, false, 64},
    {"v3 q_b_proj", 1, 24576, 1536, true, false, 0},
    {"v3 o_proj", 1, 7168, 16384, true, false, 0},
    {"v3 q_a_proj", 1, 1536, 7168, true, false, 0},
    {"v3 kv_a_proj", 1, 576, 7168, true, false, 0},
    {"v3 experts up", 8, 2048, 7168, true, true, 8},
    {"v3 experts down", 8, 7168, 2048, true, false, 8},
    {"v3 o_proj", 64, 7168, 16384, true, false, 0},
    {"v3 o_proj", 512, 7168, 16384, true, false, 0},
    {"v3 o_proj", 2048, 7168, 16384, true, false, 0},
    {"v3 o_proj", 8192, 7168, 16384, true, false, 0},
    {"v3 q_b_proj", 2048, 24576, 1536, true, false, 0},
    {"v3 experts up, 2048 tokens", 16384, 2048, 7168, true, true, 64},
    {"v3 experts down, 2048 tokens", 16384, 7168, 2048, true, false, 64},
};

void* Take(size_t bytes, int fill) {
  void* data = nullptr;
  Check(cudaMalloc(&data, bytes), "cudaMalloc");
  Check(cudaMemset(data, fill, bytes), "cudaMemset");
  return data;
}

// Bit patterns that are ordinary numbers in bf16 and e4m3, and not all equal.
void FillRandom(void* device, size_t bytes) {
  std::vector<uint8_t> host(std::min<size_t>(bytes, 1 << 20));
  uint32_t state = 12345;
  for (size_t i = 0; i < host.size(); ++i) {
    state = state * 1664525u + 1013904223u;
    host[i] = static_cast<uint8_t>(i % 2 == 0 ? state >> 24 : 0x3c | (state >> 24 & 0x81));
  }
  for (size_t at = 0; at < bytes; at += host.size()) {
    Check(cudaMemcpy(static_cast<char*>(device) + at, host.data(),
                     std::min(host.size(), bytes - at), cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }
}

struct Limits {
  double read_rate;
  double matrix_rate;
};

void Report(const Shape& s, const Limits& limits, const char* way, double us, size_t read_bytes) {
  const double rate = static_cast<double>(read_bytes) / us * 1e6;
  const double flops = 2.0 * s.rows * s.n * s.k * (s.gated ? 2 : 1) / us * 1e6;
  const double matrix_share = limits.matrix_rate > 0 ? flops / limits.matrix_rate : 0;
  const std::string name = std::string(s.name) + way;
  std::printf(
      "%-44s %5d x %6d x %5d %s %8.1f us %7.0f GB/s %5.1f %% of reading %7.1f TFLOP/s %5.1f %% of "
      "products\n",
      name.c_str(), s.rows, s.n, s.k, s.fp8 ? "fp8 " : "bf16", us, rate / 1e9,
      100 * rate / limits.read_rate, flops / 1e12, 100 * matrix_share);
  std::printf(
      "JSON {\"bench\":\"gemm\",\"name\":\"%s\",\"rows\":%d,\"n\":%d,\"k\":%d,\"fp8\":%s,"
      "\"us\":%.2f,\"gb_s\":%.1f,\"read_share\":%.4f,\"tflops\":%.2f,\"matrix_share\":%.4f}\n",
      name.c_str(), s.rows, s.n, s.k, s.fp8 ? "true" : "false", us, rate / 1e9,
      rate / limits.read_rate, flops / 1e12, matrix_share);
}

// The rows of a shape's experts in tiles; nothing if it has none.
class TileList {
 public:
  TileList(const Shape& s, int32_t tile_rows) : tile_rows_(tile_rows) {
    if (s.experts == 0) return;
    std::vector<cuda::RowTile> tiles;
    for (int32_t e = 0; e < s.experts; ++e) {
      const int32_t each = s.rows / s.experts;
      for (int32_t i = 0; i < each; i += tile_rows) {
        tiles.push_back({e, e * each + i, std::min(tile_rows, each - i)});
      }
    }
    count_ = static_cast<int32_t>(tiles.size());
    const size_t bytes = tiles.size() * sizeof(cuda::RowTile);
    tiles_ = static_cast<cuda::RowTile*>(Take(bytes, 0));
    device_count_ = static_cast<int32_t*>(Take(sizeof(count_), 0));
    Check(cudaMemcpy(tiles_, tiles.data(), bytes, cudaMemcpyHostToDevice), "tiles");
    Check(cudaMemcpy(device_count_, &count_, sizeof(count_), cudaMemcpyHostToDevice), "count");
  }
  ~TileList() {
    (void)cudaFree(tiles_);
    (void)cudaFree(device_count_);
  }
  TileList(const TileList&) = delete;
  TileList& operator=(const TileList&) = delete;

  void Set(cuda::GemmParams* p) const {
    if (tiles_ == nullptr) return;
    p->tiles = tiles_;
    p->num_tiles = device_count_;
    p->max_tiles = count_;
    p->tile_rows = tile_rows_;
  }

 private:
  const int32_t tile_rows_;
  int32_t count_ = 0;
  cuda::RowTile* tiles_ = nullptr;
  int32_t* device_count_ = nullptr;
};

// What launches cost the host, from its clock: with tensor maps and without, into a graph, so that no
// queue fills and nothing runs.
void HostTime(const Shape& s, const cuda::GemmParams& p) {
  constexpr int kLaunches = 200;
  cudaStream_t stream = nullptr;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  double us[2] = {};
  for (const bool clusters : {false, true}) {
    Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kLaunches; ++i) {
      Check(clusters ? cuda::GemmCluster(p, stream) : cuda::GemmHopper(p, 128, 256, stream),
            "launch");
    }
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
    us[clusters ? 1 : 0] = took.count() / kLaunches;
    cudaGraph_t graph = nullptr;
    Check(cudaStreamEndCapture(stream, &graph), "capture");
    Check(cudaGraphDestroy(graph), "graph");
  }
  Check(cudaStreamDestroy(stream), "stream");
  std::printf("%-44s host: a launch %.2f us by clusters, %.2f us by blocks\n", s.name, us[1],
              us[0]);
}

void Run(const Shape& s, const Limits& limits, size_t l2_bytes) {
  const int64_t stride = cuda::AlignedStride(s.k);
  const int64_t groups = s.experts > 0 ? s.experts : 1;
  const size_t weight_bytes = static_cast<size_t>(groups * s.n * stride * (s.fp8 ? 1 : 2));
  const size_t read_bytes = weight_bytes * (s.gated ? 2 : 1);
  const auto copies = static_cast<int>(2 * l2_bytes / read_bytes + 2);
  std::vector<void*> weights;
  for (int i = 0; i < copies * (s.gated ? 2 : 1); ++i) {
    weights.push_back(Take(weight_bytes, 0));
    FillRandom(weights.back(), weight_bytes);
  }
  const int64_t num_scales = groups * ((s.n + 127) / 128) * ((s.k + 127) / 128);
  auto* const scales = static_cast<float*>(Take(static_cast<size_t>(num_scales) * 4, 0));
  auto* const x = static_cast<cuda::Bf16*>(Take(static_cast<size_t>(s.rows * stride) * 2, 0));
  FillRandom(x, static_cast<size_t>(s.rows * stride) * 2);
  constexpr int64_t kSplitFloats = 8 << 20;
  auto* const split = static_cast<float*>(Take(kSplitFloats * 4, 0));
  void* const y = Take(static_cast<size_t>(s.rows) * static_cast<size_t>(s.n) * 4, 0);
  auto* const codes = static_cast<uint8_t*>(Take(static_cast<size_t>(s.rows * stride), 0));
  const int32_t scale_cols = (s.k + 127) / 128;
  auto* const x_scales = static_cast<float*>(
      Take(static_cast<size_t>(s.rows) * static_cast<size_t>(scale_cols) * 4, 0));
  const int32_t tile_rows =
      s.experts > 0 ? cuda::ExpertTileRows(s.rows, s.experts, s.fp8, false) : 0;
  // Tiles of codes are as large: the benchmark's experts with less would not take them.
  const bool coded =
      s.fp8 && cuda::MultipliesCodes() &&
      (s.experts > 0 ? tile_rows == cuda::kCodeTileRows : cuda::WorthQuantizing(s.rows, false));
  const TileList own_tiles(s, tile_rows);
  // What takes no tiles as large as clusters do.
  const TileList small_tiles(s, std::min(tile_rows, 128));
  const auto params = [&](int i) {
    cuda::GemmParams p;
    p.x = x;
    p.x_stride = stride;
    p.num_rows = s.rows;
    p.split_sums = split;
    p.split_capacity = kSplitFloats;
    const size_t at = static_cast<size_t>(i % copies) * (s.gated ? 2 : 1);
    const auto matrix = [&](void* data) {
      return cuda::Matrix{data, s.fp8 ? scales : nullptr, s.n, s.k, static_cast<int32_t>(stride)};
    };
    p.weight = matrix(weights[at]);
    if (s.gated) p.up = matrix(weights[at + 1]);
    p.weight_group_stride = s.n * stride;
    p.scale_group_stride = num_scales / groups;
    p.num_groups = static_cast<int32_t>(groups);
    own_tiles.Set(&p);
    p.y_bf16 = static_cast<cuda::Bf16*>(y);
    p.y_stride = s.n;
    return p;
  };
  // With and without, where the plan tells them apart.
  const bool hopper = limits.matrix_rate > 0;
  const auto portable_params = [&](int i) {
    cuda::GemmParams p = params(i);
    small_tiles.Set(&p);
    p.portable = true;
    return p;
  };
  const auto measure = [&](const char* way, const auto& launch) {
    Report(s, limits, way, GraphUs(launch), read_bytes);
  };
  measure("", [&](int i, cudaStream_t stream) { Check(cuda::Gemm(params(i), stream), "Gemm"); });
  const auto kind = hopper ? cuda::PlanGemm(params(0), true, cuda::Multiprocessors()).kind
                           : cuda::GemmKind::kTiles;
  if (kind == cuda::GemmKind::kCluster) {
    for (const int32_t columns : {256, 128}) {
      measure(columns == 256 ? ", blocks of 256" : ", blocks of 128",
              [&](int i, cudaStream_t stream) {
                cuda::GemmParams p = params(i);
                small_tiles.Set(&p);
                Check(cuda::GemmHopper(p, 128, columns, stream), "GemmHopper");
              });
    }
    HostTime(s, params(0));
  }
  if (hopper && kind != cuda::PlanGemm(portable_params(0), false, cuda::Multiprocessors()).kind) {
    measure(", portable", [&](int i, cudaStream_t stream) {
      Check(cuda::Gemm(portable_params(i), stream), "Gemm");
    });
  }
  if (coded) {
    const double us = GraphUs([&](int i, cudaStream_t stream) {
      cuda::QuantizeParams q;
      q.x = x;
      q.x_stride = stride;
      q.codes = codes;
      q.codes_stride = stride;
      q.scales = x_scales;
      q.num_rows = s.rows;
      q.dim = s.k;
      Check(cuda::Quantize(q, stream), "Quantize");
      cuda::GemmParams p = params(i);
      p.x_codes = codes;
      p.x_scales = x_scales;
      Check(cuda::Gemm(p, stream), "Gemm");
    });
    Report(s, limits, ", W8A8", us, read_bytes);
  }
  for (void* data : weights) Check(cudaFree(data), "cudaFree");
  for (void* data : {static_cast<void*>(scales), static_cast<void*>(x), static_cast<void*>(split),
                     y, static_cast<void*>(codes), static_cast<void*>(x_scales)}) {
    Check(cudaFree(data), "cudaFree");
  }
}

int Main(bool smoke, const char* only) {
  cuda::Device device;
  if (const std::string problem = cuda::OpenDevice(0, &device); !problem.empty()) {
    std::fprintf(stderr, "cuda_gemm_bench: %s\n", problem.c_str());
    return 1;
  }
  const Limits limits = {ReadRate(), MatrixRate()};
  std::printf("%s, reading %.0f GB/s, bf16 products %.0f TFLOP/s\n", device.name.c_str(),
              limits.read_rate / 1e9, limits.matrix_rate / 1e12);
  std::printf(
      "JSON {\"bench\":\"limits\",\"device\":\"%s\",\"read_gb_s\":%.1f,\"matrix_tflops\":%.1f}\n",
      device.name.c_str(), limits.read_rate / 1e9, limits.matrix_rate / 1e12);
  if (smoke) {
    Run({"smoke", 3, 40, 72, false, true, 0}, limits, 1024);
    Run({"smoke", 130, 40, 264, false, true, 0}, limits, 1024);
    Run({"smoke", 600, 40, 264, false, true, 2}, limits, 1024);
    Run({"smoke", 130, 40, 264, true, false, 0}, limits, 1024);
    return 0;
  }
  for (const Shape& shape : kShapes) {
    if (only == nullptr || std::strstr(shape.name, only) != nullptr) {
      Run(shape, limits, static_cast<size_t>(device.l2_bytes));
    }
  }
  return 0;
}

}  // namespace
}  // namespace strait::bench

int main(int argc, char** argv) {
  const bool smoke = argc > 1 && std::strcmp(argv[1], "--smoke") == 0;
  return strait::bench::Main(smoke, argc > 1 && !smoke ? argv[1] : nullptr);
}
