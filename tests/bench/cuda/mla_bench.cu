// SPDX-License-Identifier: Apache-2.0
//
// Measures latent attention against the rate at which this GPU reads memory, taken in the same run.
//
//   mla_bench [--smoke] [--json FILE] [--format bf16|fp8] [--path hopper|portable]
//             [--deterministic] [--only TEXT]
//   mla_bench --units [--pool-gib N] [--smoke] [--json FILE] [--only TEXT]
//   mla_bench --fp8-rows [--rounds N] [--smoke] [--json FILE] [--only TEXT]
//   mla_bench --fp8-few [--deterministic] [--rounds N] [--smoke] [--json FILE] [--only TEXT]
//
// A case is timed as the replay of a graph of launches (attention and merge) that walk over copies
// of the cache of more than twice the L2; the median of the replays, divided by the launches.
// GB/s counts what a launch must move: each cache row once, q and out. TFLOP/s counts two per
// multiply-add of scores and values, of rows that are seen. of_read: GB/s over the read rate.
// Prompts of bf16 rows also go the expanded way, where the device has it: "expanded" is attention,
// "and keys" with the product that makes keys and values, whose flops then count.
// --units: blocks as lists of column units against row-major blocks (mla_units_bench.cuh).
// --fp8-rows: fp8 rows against the same numbers in bf16 (mla_fp8_bench.cuh).
// --fp8-few: the kernel for few heads against that of tiles of 64 rows, fp8 rows (mla_few_rows_bench.cuh).
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/attention/mha_prefill.h"
#include "kernels/cuda/attention/mla.h"
#include "kernels/cuda/gemm/gemm.h"
#include "tests/bench/cuda/mla_bench.cuh"
#include "tests/bench/cuda/mla_few_rows_bench.cuh"
#include "tests/bench/cuda/mla_fp8_bench.cuh"
#include "tests/bench/cuda/mla_units_bench.cuh"

namespace strait::cuda {
namespace {

__global__ void __launch_bounds__(512) ReadKernel(const uint4* from, int64_t count, uint32_t* sum) {
  uint32_t x = 0;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  for (; i + 7 * step < count; i += 8 * step) {
    uint4 v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = __ldcs(from + i + k * step);
#pragma unroll
    for (int k = 0; k < 8; ++k) x ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  for (; i < count; i += step) x ^= from[i].x;
  if (x == 0x12345678u) *sum = x;
}

struct Options {
  bool smoke = false;
  bool deterministic = false;
  bool units = false;
  bool fp8_rows = false;
  bool few_rows = false;
  int rounds = 15;
  int64_t pool_gib = 0;
  RowFormat format = RowFormat::kBf16;
  MlaPath path = MlaPath::kAuto;
  std::string json;
  std::string only;
};

class Bench {
 public:
  Bench(const Options& options, const Device& device) : options_(options), device_(device) {}

  void Run(const Size& size, std::FILE* json) {
    const std::string name =
        std::to_string(size.heads) + " heads, " + std::to_string(size.batch) + " x " +
        std::to_string(size.length) +
        (size.new_tokens > 1 ? ", prefill " + std::to_string(size.new_tokens) : "");
    if (name.find(options_.only) == std::string::npos) return;
    const int32_t blocks = (size.length + 63) / 64;
    const int64_t block_bytes = 64 * int64_t{RowBytes(options_.format, 512, 64)};
    const int64_t cache_bytes = size.batch * blocks * block_bytes;
    const int64_t enough = options_.smoke ? 1 : 2 * int64_t{device_.l2_bytes} + (8 << 20);
    const int copies = static_cast<int>((enough + cache_bytes - 1) / cache_bytes);
    const int64_t num_blocks = int64_t{copies} * size.batch * blocks;
    std::byte* pool = Allocate<std::byte>(num_blocks * block_bytes);
    if (options_.format == RowFormat::kBf16) {
      FillBf16<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(pool), num_blocks * block_bytes / 2);
    } else {
      FillFp8Rows<<<1024, 128>>>(pool, num_blocks * 64);
    }
    std::vector<uint32_t> ids(static_cast<size_t>(num_blocks));
    std::iota(ids.begin(), ids.end(), 0u);
    std::shuffle(ids.begin(), ids.end(), std::mt19937_64(std::random_device{}()));
    uint32_t* tables = Upload(ids);
    std::vector<MlaSegment> segments(static_cast<size_t>(copies * size.batch));
    for (size_t i = 0; i < segments.size(); ++i) {
      segments[i].page_table = tables + static_cast<int64_t>(i) * blocks;
      segments[i].num_rows = size.length;
      segments[i].rank = 512;
      segments[i].format = options_.format;
    }
    MlaSegment* device_segments = Upload(segments);

    const Attention attention(size, device_, options_.deterministic);
    Check(cudaDeviceSynchronize(), "fill");

    MlaParams p = attention.params;
    p.blocks = pool;
    p.block_bytes = block_bytes;
    if (options_.format == RowFormat::kBf16) {
      Check(MakeMlaPoolMap(pool, num_blocks, block_bytes, &p.pool_map), "tensor map");
    }
    p.format = options_.format;
    p.path = options_.path;
    const bool long_run = size.new_tokens > 1;
    const int launches = options_.smoke || long_run ? 1 : std::max(copies, 8);
    const double us = Median(launches,
                             options_.smoke ? 1
                             : long_run     ? 5
                                            : 15,
                             [&](int i, cudaStream_t stream) {
                               MlaParams launch = p;
                               launch.segments = device_segments + i % copies * size.batch;
                               Check(LaunchMla(launch, stream), "launch");
                             });
    double seen = 0;  // pairs of token and row
    for (int32_t t = 0; t < size.new_tokens; ++t) seen += size.length - size.new_tokens + 1 + t;
    const double flops = 2.0 * size.batch * size.heads * seen * (576 + 512);
    const double bytes = static_cast<double>(cache_bytes) + attention.rows * (576 + 512) * 2.0;
    const double gb_per_s = bytes / us / 1e3;
    const char* format = options_.format == RowFormat::kBf16 ? "bf16" : "fp8";
    std::printf("%-34s %-5s %10.1f us %8.1f TFLOP/s %8.0f GB/s %6.3f of read\n", name.c_str(),
                format, us, flops / us / 1e6, gb_per_s, gb_per_s / device_.read_gb_per_s);
    std::fflush(stdout);
    if (json != nullptr) {
      std::fprintf(json,
                   "{\"heads\": %d, \"batch\": %d, \"length\": %d, \"new_tokens\": %d, "
                   "\"format\": \"%s\", \"deterministic\": %s, \"us\": %.2f, \"tflops\": %.2f, "
                   "\"gb_per_s\": %.1f, \"read_gb_per_s\": %.1f, \"device\": \"%s\"}\n",
                   size.heads, size.batch, size.length, size.new_tokens, format,
                   options_.deterministic ? "true" : "false", us, flops / us / 1e6, gb_per_s,
                   device_.read_gb_per_s, device_.name);
    }
    if (long_run && options_.format == RowFormat::kBf16 && HasMhaPrefill()) {
      RunExpanded(size, name, pool, block_bytes, device_segments, attention.q, attention.out, json);
    }
    for (void* memory : {static_cast<void*>(pool), static_cast<void*>(tables),
                         static_cast<void*>(device_segments)}) {
      Check(cudaFree(memory), "free");
    }
  }

 private:
  // The same prompt, one sequence, in the expanded form; out has room for it.
  void RunExpanded(const Size& size, const std::string& name, const std::byte* pool,
                   int64_t block_bytes, const MlaSegment* segments, const __nv_bfloat16* q,
                   __nv_bfloat16* out, std::FILE* json) {
    MhaPiece piece;
    piece.num_tokens = size.new_tokens;
    piece.num_keys = size.length;
    piece.first_position = size.length - size.new_tokens;
    const int64_t key_rows = MhaKeyRows(size.length);
    const int64_t columns = int64_t{size.heads} * (kMhaNope + kMhaValue);
    __nv_bfloat16* weight = Allocate<__nv_bfloat16>(columns * 512);
    FillBf16<<<1024, 256>>>(weight, columns * 512);
    __nv_bfloat16* keys = Allocate<__nv_bfloat16>(key_rows * columns);
    __nv_bfloat16* rope_keys = Allocate<__nv_bfloat16>(key_rows * kMhaRope);
    int32_t* rows = Allocate<int32_t>(key_rows);
    Check(cudaDeviceSynchronize(), "fill");

    MhaGatherParams gather;
    gather.pieces = &piece;
    gather.num_pieces = 1;
    gather.segments = segments;
    gather.blocks = pool;
    gather.block_bytes = block_bytes;
    gather.rows = rows;
    gather.rope_keys = rope_keys;
    GemmParams expand;
    expand.x = reinterpret_cast<const __nv_bfloat16*>(pool);
    expand.x_stride = 576;
    expand.x_rows = rows;
    expand.num_rows = static_cast<int32_t>(key_rows);
    expand.weight = {weight, nullptr, static_cast<int32_t>(columns), 512, 512};
    expand.y_bf16 = keys;
    expand.y_stride = columns;
    MhaPrefillParams p;
    p.pieces = &piece;
    p.num_pieces = 1;
    p.num_tokens = size.new_tokens;
    p.num_key_rows = static_cast<int32_t>(key_rows);
    p.num_heads = size.heads;
    p.q = q;
    p.q_rope = q + 512;
    p.q_token_stride = p.q_rope_token_stride = int64_t{size.heads} * 576;
    p.q_head_stride = p.q_rope_head_stride = 576;
    p.keys = keys;
    p.values = keys + kMhaNope;
    p.key_row_stride = columns;
    p.key_head_stride = kMhaNope + kMhaValue;
    p.rope_keys = rope_keys;
    p.out = out;
    p.out_stride = int64_t{size.heads} * kMhaValue;
    p.softmax_scale = 0.1f;
    const auto make_keys = [&](cudaStream_t stream) {
      Check(MhaGather(gather, stream), "gather");
      Check(Gemm(expand, stream), "expansion");
    };
    make_keys(nullptr);
    const int replays = options_.smoke ? 1 : 5;
    const double attention = Median(
        1, replays, [&](int, cudaStream_t stream) { Check(MhaPrefill(p, stream), "launch"); });
    const double all = Median(1, replays, [&](int, cudaStream_t stream) {
      make_keys(stream);
      Check(MhaPrefill(p, stream), "launch");
    });
    double seen = 0;
    for (int32_t t = 0; t < size.new_tokens; ++t) seen += size.length - size.new_tokens + 1 + t;
    const double flops = 2.0 * size.heads * seen * (kMhaNope + kMhaRope + kMhaValue);
    const double key_flops = 2.0 * static_cast<double>(columns) * 512 * size.length;
    std::printf("%-34s %-5s %10.1f us %8.1f TFLOP/s\n", (name + ", expanded").c_str(), "bf16",
                attention, flops / attention / 1e6);
    std::printf("%-34s %-5s %10.1f us %8.1f TFLOP/s\n", (name + ", and keys").c_str(), "bf16", all,
                (flops + key_flops) / all / 1e6);
    std::fflush(stdout);
    if (json != nullptr) {
      std::fprintf(json,
                   "{\"form\": \"expanded\", \"heads\": %d, \"length\": %d, \"new_tokens\": %d, "
                   "\"us\": %.2f, \"tflops\": %.2f, \"with_keys_us\": %.2f, "
                   "\"with_keys_tflops\": %.2f}\n",
                   size.heads, size.length, size.new_tokens, attention, flops / attention / 1e6,
                   all, (flops + key_flops) / all / 1e6);
    }
    for (void* memory : {static_cast<void*>(weight), static_cast<void*>(keys),
                         static_cast<void*>(rope_keys), static_cast<void*>(rows)}) {
      Check(cudaFree(memory), "free");
    }
  }

  const Options options_;
  const Device device_;
};

Device Open(bool smoke) {
  Device device;
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, 0), "no GPU");
  std::snprintf(device.name, sizeof(device.name), "%s", properties.name);
  device.multiprocessors = properties.multiProcessorCount;
  device.l2_bytes = properties.l2CacheSize;
  uint32_t* sum = Allocate<uint32_t>(1);
  for (const int64_t megabytes : {5, 38, 151, 1208}) {
    const int64_t bytes = smoke ? 1 << 20 : megabytes * 1000000 / 16 * 16;
    const int copies = std::max<int>(1, static_cast<int>(3 * int64_t{device.l2_bytes} / bytes));
    uint4* data = Allocate<uint4>(copies * bytes / 16);
    FillBf16<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(data), copies * bytes / 2);
    const double us =
        Median(std::max(copies, smoke ? 1 : 4), smoke ? 1 : 15, [&](int i, cudaStream_t stream) {
          ReadKernel<<<device.multiprocessors * 4, 512, 0, stream>>>(
              data + i % copies * (bytes / 16), bytes / 16, sum);
        });
    device.read_gb_per_s = std::max(device.read_gb_per_s, bytes / us / 1e3);
    std::printf("read %6.1f MB: %8.1f us %8.0f GB/s\n", bytes / 1e6, us, bytes / us / 1e3);
    Check(cudaFree(data), "free");
  }
  Check(cudaFree(sum), "free");
  std::printf("%s, %d multiprocessors, L2 %d MiB\n", device.name, device.multiprocessors,
              device.l2_bytes >> 20);
  return device;
}

int Main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    if (argument == "--smoke") {
      options.smoke = true;
    } else if (argument == "--deterministic") {
      options.deterministic = true;
    } else if (argument == "--units") {
      options.units = true;
    } else if (argument == "--fp8-rows") {
      options.fp8_rows = true;
    } else if (argument == "--fp8-few") {
      options.few_rows = true;
    } else if (argument == "--rounds") {
      options.rounds = std::atoi(value), ++i;
    } else if (argument == "--pool-gib") {
      options.pool_gib = std::atoll(value), ++i;
    } else if (argument == "--json") {
      options.json = value, ++i;
    } else if (argument == "--only") {
      options.only = value, ++i;
    } else if (argument == "--format") {
      options.format = std::strcmp(value, "fp8") == 0 ? RowFormat::kFp8 : RowFormat::kBf16;
      ++i;
    } else if (argument == "--path") {
      options.path = std::strcmp(value, "portable") == 0 ? MlaPath::kPortable : MlaPath::kHopper;
      ++i;
    } else {
      std::fprintf(stderr, "unknown argument %s\n", argument.c_str());
      return 2;
    }
  }
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    std::fprintf(stderr, "SKIPPED, nothing was measured: %s\n",
                 error != cudaSuccess ? cudaGetErrorString(error) : "no GPU");
    return 77;
  }
  if ((options.units || options.fp8_rows || options.few_rows) &&
      MlaAutoPath(RowFormat::kBf16, 512, 64) != MlaPath::kHopper) {
    std::fprintf(stderr, "SKIPPED, nothing was measured: this is of the Hopper kernel\n");
    return 77;
  }
  const Device device = Open(options.smoke);
  Check(PrepareMla(), "prepare");
  Check(PrepareMhaPrefill(), "prepare");
  std::FILE* json = options.json.empty() ? nullptr : std::fopen(options.json.c_str(), "w");
  if (!options.json.empty() && json == nullptr) {
    std::perror(options.json.c_str());
    return 1;
  }
  if (options.fp8_rows) {
    const bool same =
        RunFp8({options.smoke, std::max(1, options.rounds), options.only}, device, json);
    if (json != nullptr) std::fclose(json);
    return same ? 0 : 1;
  }
  if (options.few_rows) {
    const bool same = RunFewRows(
        {options.smoke, options.deterministic, std::max(1, options.rounds), options.only}, device,
        json);
    if (json != nullptr) std::fclose(json);
    return same ? 0 : 1;
  }
  if (options.units) {
    const bool same = RunUnits({options.smoke, options.pool_gib << 30, options.only}, device, json);
    if (json != nullptr) std::fclose(json);
    return same ? 0 : 1;
  }
  Bench bench(options, device);
  std::vector<Size> sizes = {
      {128, 1, 4096},  {128, 1, 32768},     {128, 1, 131072},    {128, 16, 4096},
      {128, 64, 4096}, {128, 128, 4096},    {128, 128, 8192},    {128, 32, 32768},
      {64, 1, 131072}, {64, 16, 4096},      {64, 64, 4096},      {64, 128, 8192},
      {64, 32, 32768}, {16, 1, 4096},       {16, 1, 32768},      {16, 1, 131072},
      {16, 16, 4096},  {16, 64, 4096},      {16, 128, 4096},     {16, 128, 8192},
      {16, 32, 32768}, {16, 1, 8192, 8192}, {16, 1, 8192, 2048}, {128, 1, 8192, 8192}};
  if (options.smoke) sizes = {{128, 1, 300}, {16, 3, 100}, {16, 1, 70, 70}};
  for (const Size& size : sizes) {
    if (options.deterministic && size.new_tokens > 1) continue;  // its partials: gigabytes
    bench.Run(size, json);
  }
  if (json != nullptr) std::fclose(json);
  return 0;
}

}  // namespace
}  // namespace strait::cuda

int main(int argc, char** argv) { return strait::cuda::Main(argc, argv); }
