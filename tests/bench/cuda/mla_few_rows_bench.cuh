// SPDX-License-Identifier: Apache-2.0
//
// Decoding with few heads over fp8 rows: the kernel of tiles of 64 rows against the few-rows kernel,
// replayed in turn.
//
//   64 rows   MlaParams::tile_rows = 64: what a ratio is of; "again" is the same once more
//   few rows  MlaParams::tile_rows = 16
// A ratio is the median over rounds of time over the time of "64 rows" in that round. error: of a
// result to that of "64 rows", root of the mean square, of which that one's own is most (3e-3); the
// largest of launches by themselves and of the last of the replays.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/attention/mla.h"
#include "tests/bench/cuda/mla_bench.cuh"

namespace strait::cuda {

struct FewRowsOptions {
  bool smoke = false;
  bool deterministic = false;
  int rounds = 15;
  std::string only;
};

class FewRowsBench {
 public:
  FewRowsBench(const FewRowsOptions& options, const Device& device)
      : options_(options), device_(device) {}

  // Whether all results agree.
  bool Run(const Size& size, std::FILE* json) {
    const std::string name = std::to_string(size.heads) + " heads, " + std::to_string(size.batch) +
                             " x " + std::to_string(size.length);
    if (name.find(options_.only) == std::string::npos) return true;
    const int64_t block_bytes = 64 * int64_t{RowBytes(RowFormat::kFp8, 512, 64)};
    const int32_t blocks = (size.length + 63) / 64;
    const int64_t cache_bytes = int64_t{size.batch} * blocks * block_bytes;
    const int64_t enough = options_.smoke ? 1 : 2 * int64_t{device_.l2_bytes} + (8 << 20);
    const int copies = static_cast<int>((enough + cache_bytes - 1) / cache_bytes);
    const int64_t num_blocks = int64_t{copies} * size.batch * blocks;
    std::byte* const rows = Allocate<std::byte>(num_blocks * block_bytes);
    FillFp8Rows<<<1024, 128>>>(rows, num_blocks * 64);
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
    const Attention attention(size, device_, options_.deterministic);
    Check(cudaDeviceSynchronize(), "fill");

    std::vector<Way> ways(3);
    ways[0].name = "64 rows";
    ways[1].name = "again";
    ways[2].name = "few rows";
    for (Way& way : ways) {
      way.params = attention.params;
      way.params.path = MlaPath::kHopper;
      way.params.segments = device_segments;
      way.params.format = RowFormat::kFp8;
      way.params.block_bytes = block_bytes;
      way.params.blocks = rows;
    }
    ways[2].params.tile_rows = kMlaFewRows;
    const int launches = options_.smoke ? 1 : std::max(copies, 8);
    std::vector<std::vector<float>> expected;
    const std::vector<int> compared = {0, (launches - 1) % copies, copies - 1};
    for (const int copy : compared) expected.push_back(Out(ways[0], size, copy, attention.rows));
    for (Way& way : ways) {
      for (size_t i = 0; i < compared.size(); ++i) {
        Include(expected[i], Out(way, size, compared[i], attention.rows), &way.error);
      }
      way.replay = std::make_unique<Replay>(launches, [&](int i, cudaStream_t stream) {
        Launch(way, size.batch, i % copies, stream);
      });
      Clear(way, attention.rows);
      way.replay->Time();
      Include(expected[1], Read(way, attention.rows), &way.error);
    }
    Measure(ways);
    // Results of the last of many replays in turn, too.
    for (Way& way : ways) {
      Clear(way, attention.rows);
      way.replay->Time();
      Include(expected[1], Read(way, attention.rows), &way.error);
    }
    Print(ways, name, size, cache_bytes + attention.rows * (576 + 512) * 2, json);
    for (void* memory : std::initializer_list<void*>{rows, table, device_segments}) {
      Check(cudaFree(memory), "free");
    }
    return std::all_of(ways.begin(), ways.end(), [](const Way& way) { return way.error < 1e-2; });
  }

 private:
  struct Way {
    std::string name;
    MlaParams params;
    double error = 0;
    std::unique_ptr<Replay> replay;
    std::vector<double> times;
    std::vector<double> ratios;
  };

  // Launch i of a way walks over copy i % copies.
  static void Launch(const Way& way, int32_t batch, int copy, cudaStream_t stream) {
    MlaParams launch = way.params;
    launch.segments += int64_t{copy} * batch;
    Check(LaunchMla(launch, stream), "launch");
  }

  static void Clear(const Way& way, int64_t rows) {
    Check(cudaMemset(way.params.out, 0xff, static_cast<size_t>(rows) * 1024), "clear");
    Check(cudaDeviceSynchronize(), "clear");
  }
  static std::vector<float> Read(const Way& way, int64_t rows) {
    std::vector<uint16_t> bits(static_cast<size_t>(rows) * 512);
    Check(cudaMemcpy(bits.data(), way.params.out, bits.size() * 2, cudaMemcpyDeviceToHost),
          "launch by itself, out");
    std::vector<float> out(bits.size());
    for (size_t i = 0; i < bits.size(); ++i) {
      const uint32_t wide = uint32_t{bits[i]} << 16;
      std::memcpy(&out[i], &wide, sizeof(wide));
    }
    return out;
  }
  static std::vector<float> Out(const Way& way, const Size& size, int copy, int64_t rows) {
    Clear(way, rows);
    Launch(way, size.batch, copy, nullptr);
    return Read(way, rows);
  }

  // Raises *most to the error of `actual`; NaN stays.
  static void Include(const std::vector<float>& expected, const std::vector<float>& actual,
                      double* most) {
    double error = 0;
    double norm = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      const double by = double{actual[i]} - expected[i];
      error += by * by;
      norm += double{expected[i]} * expected[i];
    }
    const double relative = std::sqrt(error / norm);
    if (!std::isnan(*most) && !(relative <= *most)) *most = relative;
  }

  void Measure(std::vector<Way>& ways) const {
    const int count = static_cast<int>(ways.size());
    const int rounds = options_.smoke ? 1 : options_.rounds;
    for (int round = 0; round < rounds; ++round) {
      for (int i = 0; i < count; ++i) {
        Way& way = ways[static_cast<size_t>(
            round % 2 == 0 ? (round / 2 + i) % count : ((round / 2 - i) % count + count) % count)];
        way.times.push_back(MedianOf({way.replay->Time(), way.replay->Time(), way.replay->Time()}));
      }
      for (Way& way : ways) way.ratios.push_back(way.times.back() / ways[0].times.back());
    }
  }

  void Print(const std::vector<Way>& ways, const std::string& name, const Size& size, int64_t bytes,
             std::FILE* json) const {
    const double limit_us = static_cast<double>(bytes) / device_.read_gb_per_s / 1e3;
    std::printf("%s%s: limit %.1f us\n", name.c_str(),
                options_.deterministic ? ", deterministic" : "", limit_us);
    for (const Way& way : ways) {
      const double us = MedianOf(way.times);
      const double ratio = MedianOf(way.ratios);
      const auto [least, most] = std::minmax_element(way.ratios.begin(), way.ratios.end());
      const double gb_per_s = static_cast<double>(bytes) / us / 1e3;
      std::printf(
          "  %-14s %8.1f us %6.0f GB/s %5.3f of read, ratio %5.3f (%5.3f-%5.3f), error %.1e\n",
          way.name.c_str(), us, gb_per_s, gb_per_s / device_.read_gb_per_s, ratio, *least, *most,
          way.error);
      if (json != nullptr) {
        std::fprintf(json,
                     "{\"form\": \"few rows\", \"format\": \"fp8\", \"heads\": %d, \"batch\": %d, "
                     "\"length\": %d, "
                     "\"deterministic\": %s, \"way\": \"%s\", \"us\": %.2f, \"gb_per_s\": %.1f, "
                     "\"ratio\": %.4f, \"least\": %.4f, \"most\": %.4f, \"error\": %.3e, "
                     "\"read_gb_per_s\": %.1f, \"device\": \"%s\"}\n",
                     size.heads, size.batch, size.length, options_.deterministic ? "true" : "false",
                     way.name.c_str(), us, gb_per_s, ratio, *least, *most, way.error,
                     device_.read_gb_per_s, device_.name);
      }
    }
    std::fflush(stdout);
    if (json != nullptr) std::fflush(json);
  }

  const FewRowsOptions options_;
  const Device device_;
};

// Whether all results agree at every size.
inline bool RunFewRows(const FewRowsOptions& options, const Device& device, std::FILE* json) {
  std::vector<Size> sizes;
  for (const int32_t heads : {16, 8}) {
    for (const auto& [batch, length] :
         {std::pair{1, 131072}, {16, 4096}, {64, 4096}, {128, 4096}, {128, 8192}, {32, 32768}}) {
      sizes.push_back({heads, batch, length});
    }
  }
  if (options.smoke) sizes = {{16, 1, 300}, {8, 3, 100}};
  FewRowsBench bench(options, device);
  bool same = true;
  for (const Size& size : sizes) same &= bench.Run(size, json);
  return same;
}

}  // namespace strait::cuda
