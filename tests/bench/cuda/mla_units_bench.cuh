// SPDX-License-Identifier: Apache-2.0
//
// Decoding over blocks that are lists of column units (mla.h) against row-major blocks: the same rows
// and queries, replayed in turn.
//
// "rows" are row-major blocks, scattered at random over a pool; "again" is the same once more, which
// shows what the measurement itself gives; "units" are scattered one by one, "wide" is the same with
// 256 bytes brought to L2 for each 128 read, "together" keeps the nine units of a block side by side.
// A ratio is the median over rounds of time over the time of "rows" in that round; beside it the
// least and the greatest. Each layout has a pool of its own, of pool_bytes or more: with the few
// gigabytes that a batch needs, a scattered pool is within the reach of address translation.
#pragma once

#include <array>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "tests/bench/cuda/mla_bench.cuh"

namespace strait::cuda {

struct UnitsOptions {
  bool smoke = false;
  int64_t pool_bytes = 0;
  std::string only;
};

// Block i of the tables, from the row-major pool into its nine units.
static __global__ void RowsToUnits(const uint4* rows, const uint32_t* pages, uint4* units,
                                   const uint32_t* unit_ids, int64_t num_blocks) {
  for (int64_t block = blockIdx.x; block < num_blocks; block += gridDim.x) {
    for (int i = threadIdx.x; i < 64 * 72; i += blockDim.x) {
      const int piece = i % 72;
      const int64_t unit = unit_ids[block * kMlaBlockUnits + piece / 8];
      units[unit * (kMlaUnitBytes / 16) + i / 72 * 8 + piece % 8] =
          rows[int64_t{pages[block]} * (64 * 72) + i];
    }
  }
}

class UnitsBench {
 public:
  UnitsBench(const UnitsOptions& options, const Device& device)
      : options_(options), device_(device) {}

  // Whether all layouts gave the same bits.
  bool Run(const Size& size, std::FILE* json) {
    const std::string name = std::to_string(size.heads) + " heads, " + std::to_string(size.batch) +
                             " x " + std::to_string(size.length);
    if (name.find(options_.only) == std::string::npos) return true;
    const int32_t blocks = (size.length + 63) / 64;
    const int64_t cache_bytes = int64_t{size.batch} * blocks * kBlockBytes;
    const int64_t enough = options_.smoke ? 1 : 2 * int64_t{device_.l2_bytes} + (8 << 20);
    const int copies = static_cast<int>((enough + cache_bytes - 1) / cache_bytes);
    const int64_t used = int64_t{copies} * size.batch * blocks;
    const int64_t pool_blocks = std::max(used, options_.pool_bytes / kBlockBytes);
    const std::vector<uint32_t> pages = Scattered(pool_blocks, used);
    std::vector<uint32_t> together;
    for (const uint32_t page : Scattered(pool_blocks, used)) {
      for (uint32_t i = 0; i < kMlaBlockUnits; ++i) together.push_back(page * kMlaBlockUnits + i);
    }
    std::byte* const row_pool = Allocate<std::byte>(pool_blocks * kBlockBytes);
    std::byte* const unit_pool = Allocate<std::byte>(pool_blocks * kBlockBytes);
    std::byte* const together_pool = Allocate<std::byte>(pool_blocks * kBlockBytes);
    uint32_t* const row_table = Upload(pages);
    uint32_t* const unit_table =
        Upload(Scattered(pool_blocks * kMlaBlockUnits, used * kMlaBlockUnits));
    uint32_t* const together_table = Upload(together);
    FillBf16<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(row_pool),
                            pool_blocks * kBlockBytes / 2);
    ToUnits(row_pool, row_table, unit_pool, unit_table, used);
    ToUnits(row_pool, row_table, together_pool, together_table, used);
    MlaSegment* const row_segments = Segments(size, copies, row_table, blocks);
    MlaSegment* const unit_segments = Segments(size, copies, unit_table, blocks * kMlaBlockUnits);
    MlaSegment* const together_segments =
        Segments(size, copies, together_table, blocks * kMlaBlockUnits);

    const Attention attention(size, device_, false);
    Check(cudaDeviceSynchronize(), "fill");

    std::array<MlaParams, kLayouts> layouts;
    layouts.fill(attention.params);
    for (MlaParams& layout : layouts) layout.path = MlaPath::kHopper;
    for (const int i : {0, 1}) {
      layouts[i].blocks = row_pool;
      layouts[i].block_bytes = kBlockBytes;
      layouts[i].segments = row_segments;
      Check(MakeMlaPoolMap(row_pool, pool_blocks, kBlockBytes, &layouts[i].pool_map), "tensor map");
    }
    for (const int i : {2, 3, 4}) {
      layouts[i].units = true;
      layouts[i].blocks = i == 4 ? together_pool : unit_pool;
      layouts[i].block_bytes = kMlaUnitBytes;
      layouts[i].segments = i == 4 ? together_segments : unit_segments;
      Check(MakeMlaUnitMap(layouts[i].blocks, pool_blocks * kMlaBlockUnits, i == 3,
                           &layouts[i].pool_map),
            "tensor map");
    }
    const int64_t rows = attention.rows;
    const bool same = SameBits(layouts, size.batch, copies, rows);
    Measure(layouts, name, size, copies, cache_bytes + rows * (576 + 512) * 2, same, json);
    for (void* memory : std::initializer_list<void*>{row_pool, unit_pool, together_pool, row_table,
                                                     unit_table, together_table, row_segments,
                                                     unit_segments, together_segments}) {
      Check(cudaFree(memory), "free");
    }
    return same;
  }

 private:
  static constexpr int64_t kBlockBytes = kMlaBlockUnits * kMlaUnitBytes;
  static constexpr int kLayouts = 5;
  static constexpr const char* kNames[kLayouts] = {"rows", "again", "units", "wide", "together"};

  // The first `count` of the ids below `all`, in random order.
  static std::vector<uint32_t> Scattered(int64_t all, int64_t count) {
    std::vector<uint32_t> ids(static_cast<size_t>(all));
    std::iota(ids.begin(), ids.end(), 0u);
    std::shuffle(ids.begin(), ids.end(), std::mt19937_64(std::random_device{}()));
    ids.resize(static_cast<size_t>(count));
    return ids;
  }

  static void ToUnits(const std::byte* rows, const uint32_t* pages, std::byte* units,
                      const uint32_t* ids, int64_t num_blocks) {
    RowsToUnits<<<1024, 256>>>(reinterpret_cast<const uint4*>(rows), pages,
                               reinterpret_cast<uint4*>(units), ids, num_blocks);
  }

  static MlaSegment* Segments(const Size& size, int copies, const uint32_t* table, int64_t stride) {
    std::vector<MlaSegment> segments(static_cast<size_t>(copies * size.batch));
    for (size_t i = 0; i < segments.size(); ++i) {
      segments[i].page_table = table + static_cast<int64_t>(i) * stride;
      segments[i].num_rows = size.length;
      segments[i].rank = 512;
    }
    return Upload(segments);
  }

  // Launch i of a layout walks over copy i % copies.
  static void Launch(const MlaParams& layout, int32_t batch, int copy, cudaStream_t stream) {
    MlaParams launch = layout;
    launch.segments += int64_t{copy} * batch;
    Check(LaunchMla(launch, stream), "launch");
  }

  static bool SameBits(const std::array<MlaParams, kLayouts>& layouts, int32_t batch, int copies,
                       int64_t rows) {
    bool same = true;
    for (int copy = 0; copy < copies; copy += std::max(1, copies - 1)) {
      std::vector<std::byte> expected;
      for (const MlaParams& layout : layouts) {
        Check(cudaMemset(layout.out, 0xff, static_cast<size_t>(rows) * 1024), "clear");
        Check(cudaMemset(layout.lse, 0xff, static_cast<size_t>(rows) * 4), "clear");
        Launch(layout, batch, copy, nullptr);
        std::vector<std::byte> bytes(static_cast<size_t>(rows) * (1024 + 4));
        Check(cudaMemcpy(bytes.data(), layout.out, static_cast<size_t>(rows) * 1024,
                         cudaMemcpyDeviceToHost),
              "out");
        Check(cudaMemcpy(bytes.data() + rows * 1024, layout.lse, static_cast<size_t>(rows) * 4,
                         cudaMemcpyDeviceToHost),
              "lse");
        if (expected.empty()) expected = bytes;
        same &= bytes == expected;
      }
    }
    return same;
  }

  void Measure(const std::array<MlaParams, kLayouts>& layouts, const std::string& name,
               const Size& size, int copies, int64_t bytes, bool same, std::FILE* json) const {
    const int launches = options_.smoke ? 1 : std::max(copies, 8);
    std::array<std::unique_ptr<Replay>, kLayouts> replays;
    for (int l = 0; l < kLayouts; ++l) {
      replays[l] = std::make_unique<Replay>(launches, [&](int i, cudaStream_t stream) {
        Launch(layouts[l], size.batch, i % copies, stream);
      });
    }
    std::vector<double> times[kLayouts];
    std::vector<double> ratios[kLayouts];
    const int rounds = options_.smoke ? 1 : 25;
    for (int round = 0; round < rounds; ++round) {
      double now[kLayouts];
      for (int i = 0; i < kLayouts; ++i) {  // each comes first, and after each other, as often
        const int l =
            round % 2 == 0 ? (round / 2 + i) % kLayouts : (round / 2 + kLayouts - i) % kLayouts;
        now[l] = MedianOf({replays[l]->Time(), replays[l]->Time(), replays[l]->Time()});
      }
      for (int l = 0; l < kLayouts; ++l) {
        times[l].push_back(now[l]);
        ratios[l].push_back(now[l] / now[0]);
      }
    }
    const double rows_us = MedianOf(times[0]);
    const double gb_per_s = static_cast<double>(bytes) / rows_us / 1e3;
    std::printf("%-24s rows %8.1f us %5.3f of read", name.c_str(), rows_us,
                gb_per_s / device_.read_gb_per_s);
    if (json != nullptr) {
      std::fprintf(json,
                   "{\"form\": \"units\", \"heads\": %d, \"batch\": %d, \"length\": %d, "
                   "\"pool_gib\": %.2f, \"same_bits\": %s, \"read_gb_per_s\": %.1f, "
                   "\"device\": \"%s\", \"rows_us\": %.2f",
                   size.heads, size.batch, size.length,
                   static_cast<double>(options_.pool_bytes) * 0x1p-30, same ? "true" : "false",
                   device_.read_gb_per_s, device_.name, rows_us);
    }
    for (int l = 1; l < kLayouts; ++l) {
      const double us = MedianOf(times[l]);
      const double ratio = MedianOf(ratios[l]);
      const auto [least, most] = std::minmax_element(ratios[l].begin(), ratios[l].end());
      std::printf(" | %s %8.1f %5.3f (%5.3f-%5.3f)", kNames[l], us, ratio, *least, *most);
      if (json != nullptr) {
        std::fprintf(json,
                     ", \"%s_us\": %.2f, \"%s_ratio\": %.4f, \"%s_least\": %.4f, "
                     "\"%s_most\": %.4f",
                     kNames[l], us, kNames[l], ratio, kNames[l], *least, kNames[l], *most);
      }
    }
    std::printf(same ? "\n" : " BITS DIFFER\n");
    std::fflush(stdout);
    if (json != nullptr) std::fprintf(json, "}\n");
  }

  const UnitsOptions options_;
  const Device device_;
};

// Whether all layouts gave the same bits at every size.
inline bool RunUnits(const UnitsOptions& options, const Device& device, std::FILE* json) {
  std::vector<Size> sizes;
  for (const int32_t heads : {16, 64, 128}) {
    for (const auto& [batch, length] : {std::pair{1, 4096},
                                        {16, 4096},
                                        {64, 4096},
                                        {128, 4096},
                                        {128, 8192},
                                        {32, 32768},
                                        {1, 131072}}) {
      sizes.push_back({heads, batch, length});
    }
  }
  if (options.smoke) sizes = {{128, 1, 300}, {16, 3, 100}, {64, 2, 70}};
  UnitsBench bench(options, device);
  bool same = true;
  for (const Size& size : sizes) same &= bench.Run(size, json);
  return same;
}

}  // namespace strait::cuda
