// SPDX-License-Identifier: Apache-2.0
//
// Decoding over fp8 rows and over the same numbers in bf16: replayed in turn.
//
//   fp8    row-major blocks: what a ratio is of; "again" is the same once more
//   bf16   the numbers that the codes stand for, rounded as the feeder rounds them
//   registers  the kernels that widen codes in registers, by MlaParams::tile_rows: up to 32 heads
// The first three must give the same bits: the consumers find the same tile. The last differs by the
// roundings of the others: "error" is the root of the mean square to "fp8". A ratio is the median over
// rounds of time over the time of "fp8" in that round.
#pragma once

#include <cuda_fp8.h>

#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "tests/bench/cuda/mla_bench.cuh"

namespace strait::cuda {

struct Fp8Options {
  bool smoke = false;
  int rounds = 15;
  std::string only;
};

constexpr int64_t kFp8BlockBytes = 64 * int64_t{RowBytes(RowFormat::kFp8, 512, 64)};

// Rows of row-major fp8 blocks in bf16.
static __global__ void WidenFp8Rows(const std::byte* rows, __nv_bfloat16* wide, int64_t num_rows) {
  for (int64_t at = blockIdx.x; at < num_rows; at += gridDim.x) {
    const std::byte* const from = rows + at * 656;
    for (int i = threadIdx.x; i < 512; i += blockDim.x) {
      __nv_fp8_e4m3 code;
      code.__x = static_cast<__nv_fp8_storage_t>(from[i]);
      const float scale = reinterpret_cast<const float*>(from + 512)[i / 128];
      wide[at * 576 + i] = __float2bfloat16(static_cast<float>(code) * scale);
    }
    for (int i = threadIdx.x; i < 64; i += blockDim.x) {
      wide[at * 576 + 512 + i] = reinterpret_cast<const __nv_bfloat16*>(from + 528)[i];
    }
  }
}

class Fp8Bench {
 public:
  Fp8Bench(const Fp8Options& options, const Device& device) : options_(options), device_(device) {}

  // Whether all ways agree.
  bool Run(const Size& size, std::FILE* json) {
    const std::string name = std::to_string(size.heads) + " heads, " + std::to_string(size.batch) +
                             " x " + std::to_string(size.length);
    if (name.find(options_.only) == std::string::npos) return true;
    const int32_t blocks = (size.length + 63) / 64;
    const int64_t cache_bytes = int64_t{size.batch} * blocks * kFp8BlockBytes;
    const int64_t enough = options_.smoke ? 1 : 2 * int64_t{device_.l2_bytes} + (8 << 20);
    const int copies = static_cast<int>((enough + cache_bytes - 1) / cache_bytes);
    const int64_t num_blocks = int64_t{copies} * size.batch * blocks;
    constexpr int64_t kBf16BlockBytes = 64 * int64_t{RowBytes(RowFormat::kBf16, 512, 64)};
    std::byte* const rows = Allocate<std::byte>(num_blocks * kFp8BlockBytes);
    std::byte* const wide = Allocate<std::byte>(num_blocks * kBf16BlockBytes);
    FillFp8Rows<<<1024, 128>>>(rows, num_blocks * 64);
    WidenFp8Rows<<<1024, 128>>>(rows, reinterpret_cast<__nv_bfloat16*>(wide), num_blocks * 64);
    std::vector<uint32_t> ids(static_cast<size_t>(num_blocks));
    std::iota(ids.begin(), ids.end(), 0u);
    std::shuffle(ids.begin(), ids.end(), std::mt19937_64(std::random_device{}()));
    uint32_t* const table = Upload(ids);
    std::vector<MlaSegment> segments(static_cast<size_t>(copies * size.batch));
    for (size_t i = 0; i < segments.size(); ++i) {
      segments[i].page_table = table + static_cast<int64_t>(i) * blocks;
      segments[i].num_rows = size.length;
      segments[i].rank = 512;
    }
    MlaSegment* const device_segments = Upload(segments);
    const Attention attention(size, device_, false);
    Check(cudaDeviceSynchronize(), "fill");

    std::array<MlaParams, kWays> ways;
    ways.fill(attention.params);
    for (int i = 0; i < kWays; ++i) {
      MlaParams& p = ways[i];
      p.path = MlaPath::kHopper;
      p.segments = device_segments;
      p.format = kTable[i].bf16 ? RowFormat::kBf16 : RowFormat::kFp8;
      p.block_bytes = kTable[i].bf16 ? kBf16BlockBytes : kFp8BlockBytes;
      p.blocks = kTable[i].bf16 ? wide : rows;
      if (kTable[i].registers) p.tile_rows = std::min(size.heads, kMlaTileRows);
      if (kTable[i].bf16) {
        Check(MakeMlaPoolMap(wide, num_blocks, kBf16BlockBytes, &p.pool_map), "tensor map");
      }
    }
    const std::string differ = Different(ways, size.batch, copies, attention.rows);
    Measure(ways, name, size, copies, cache_bytes + attention.rows * (576 + 512) * 2, differ, json);
    for (void* memory : std::initializer_list<void*>{rows, wide, table, device_segments}) {
      Check(cudaFree(memory), "free");
    }
    return differ.empty();
  }

 private:
  struct Way {
    const char* name;
    bool bf16;
    bool registers;
  };
  static constexpr Way kTable[] = {{"fp8", false, false},
                                   {"again", false, false},
                                   {"bf16", true, false},
                                   {"registers", false, true}};
  static constexpr int kWays = static_cast<int>(std::size(kTable));

  // Launch i of a way walks over copy i % copies.
  static void Launch(const MlaParams& way, int32_t batch, int copy, cudaStream_t stream) {
    MlaParams launch = way;
    launch.segments += int64_t{copy} * batch;
    Check(LaunchMla(launch, stream), "launch");
  }

  // The ways whose results are not those of the first, to the bit or nearly.
  static std::string Different(const std::array<MlaParams, kWays>& ways, int32_t batch, int copies,
                               int64_t rows) {
    std::string differ;
    for (int w = 0; w < kWays; ++w) {
      bool same = true;
      for (int copy = 0; copy < copies; copy += std::max(1, copies - 1)) {
        const std::vector<std::byte> expected = Bits(ways[0], batch, copy, rows);
        const std::vector<std::byte> actual = Bits(ways[w], batch, copy, rows);
        same &= kTable[w].registers ? Error(expected, actual, rows) < 1e-2 : actual == expected;
      }
      if (!same) differ += std::string(" ") + kTable[w].name;
    }
    return differ;
  }
  // Of results in bf16; NaN is no error below any.
  static double Error(const std::vector<std::byte>& expected, const std::vector<std::byte>& actual,
                      int64_t rows) {
    double error = 0;
    double norm = 0;
    for (int64_t i = 0; i < rows * 512; ++i) {
      const auto at = [&](const std::vector<std::byte>& bytes) {
        uint16_t bits;
        std::memcpy(&bits, bytes.data() + i * 2, sizeof(bits));
        const uint32_t wide = uint32_t{bits} << 16;
        float value;
        std::memcpy(&value, &wide, sizeof(value));
        return double{value};
      };
      const double by = at(actual) - at(expected);
      error += by * by;
      norm += at(expected) * at(expected);
    }
    const double relative = std::sqrt(error / norm);
    std::printf("error %.2e\n", relative);
    return relative;
  }
  static std::vector<std::byte> Bits(const MlaParams& way, int32_t batch, int copy, int64_t rows) {
    Check(cudaMemset(way.out, 0xff, static_cast<size_t>(rows) * 1024), "clear");
    Check(cudaMemset(way.lse, 0xff, static_cast<size_t>(rows) * 4), "clear");
    Launch(way, batch, copy, nullptr);
    std::vector<std::byte> bytes(static_cast<size_t>(rows) * (1024 + 4));
    Check(
        cudaMemcpy(bytes.data(), way.out, static_cast<size_t>(rows) * 1024, cudaMemcpyDeviceToHost),
        "out");
    Check(cudaMemcpy(bytes.data() + rows * 1024, way.lse, static_cast<size_t>(rows) * 4,
                     cudaMemcpyDeviceToHost),
          "lse");
    return bytes;
  }

  void Measure(const std::array<MlaParams, kWays>& ways, const std::string& name, const Size& size,
               int copies, int64_t bytes, const std::string& differ, std::FILE* json) const {
    const int launches = options_.smoke ? 1 : std::max(copies, 8);
    std::array<std::unique_ptr<Replay>, kWays> replays;
    for (int w = 0; w < kWays; ++w) {
      replays[w] = std::make_unique<Replay>(launches, [&](int i, cudaStream_t stream) {
        Launch(ways[w], size.batch, i % copies, stream);
      });
    }
    std::vector<double> times[kWays];
    std::vector<double> ratios[kWays];
    const int rounds = options_.smoke ? 1 : options_.rounds;
    for (int round = 0; round < rounds; ++round) {
      double now[kWays];
      for (int i = 0; i < kWays; ++i) {
        const int w = round % 2 == 0 ? (round / 2 + i) % kWays : (round / 2 + kWays - i) % kWays;
        now[w] = MedianOf({replays[w]->Time(), replays[w]->Time(), replays[w]->Time()});
      }
      for (int w = 0; w < kWays; ++w) {
        times[w].push_back(now[w]);
        ratios[w].push_back(now[w] / now[0]);
      }
    }
    std::printf("%s: %s\n", name.c_str(),
                differ.empty() ? "all agree" : ("DIFFERENT:" + differ).c_str());
    for (int w = 0; w < kWays; ++w) {
      const double us = MedianOf(times[w]);
      const double ratio = MedianOf(ratios[w]);
      const auto [least, most] = std::minmax_element(ratios[w].begin(), ratios[w].end());
      const double moved = static_cast<double>(bytes);  // of bf16: more
      std::printf("  %-20s %8.1f us %6.3f (%5.3f-%5.3f)", kTable[w].name, us, ratio, *least, *most);
      if (!kTable[w].bf16) std::printf(" %5.3f of read", moved / us / 1e3 / device_.read_gb_per_s);
      std::printf("\n");
      if (json != nullptr) {
        std::fprintf(json,
                     "{\"form\": \"fp8 rows\", \"heads\": %d, \"batch\": %d, \"length\": %d, "
                     "\"way\": \"%s\", \"us\": %.2f, \"ratio\": %.4f, \"least\": %.4f, "
                     "\"most\": %.4f, \"differ\": \"%s\", \"read_gb_per_s\": %.1f, "
                     "\"device\": \"%s\"}\n",
                     size.heads, size.batch, size.length, kTable[w].name, us, ratio, *least, *most,
                     differ.c_str(), device_.read_gb_per_s, device_.name);
      }
    }
    std::fflush(stdout);
  }

  const Fp8Options options_;
  const Device device_;
};

// Whether all ways agree at every size.
inline bool RunFp8(const Fp8Options& options, const Device& device, std::FILE* json) {
  std::vector<Size> sizes;
  for (const int32_t heads : {16, 32, 64, 128}) {
    for (const auto& [batch, length] :
         {std::pair{16, 4096}, {64, 4096}, {128, 8192}, {1, 131072}}) {
      sizes.push_back({heads, batch, length});
    }
  }
  if (options.smoke) sizes = {{128, 1, 300}, {16, 3, 100}, {64, 2, 70}, {32, 2, 130}};
  Fp8Bench bench(options, device);
  bool same = true;
  for (const Size& size : sizes) same &= bench.Run(size, json);
  return same;
}

}  // namespace strait::cuda
