// SPDX-License-Identifier: Apache-2.0
//
// What blocks in units cost: time of each operation of the pool, and bytes of padding.
//
//   unit_pool_bench [--smoke]
//
// Operations: a pool of 1 GiB of V3's units is filled with blocks of mixed formats and ranks; then each
// operation is done to many of them in random order, and the mean is printed. Padding: of each format, over
// ranks in steps of 16 up to the whole one.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "proto/base/check.h"
#include "proto/model/reservation.h"
#include "worker/cache/unit_pool.h"

namespace strait {
namespace {

constexpr RowFormat kFormats[] = {RowFormat::kBf16, RowFormat::kFp8, RowFormat::kInt4};

class Bench {
 public:
  explicit Bench(uint32_t num_units) : pool_(64, num_units) {}

  void Run() {
    Time("take", [&] {
      while (auto block = pool_.Take(Shape())) blocks_.push_back(std::move(*block));
      return blocks_.size();
    });
    std::shuffle(blocks_.begin(), blocks_.end(), rng_);
    const size_t half = blocks_.size() / 2;
    Time("give", [&] {
      for (; blocks_.size() > half; blocks_.pop_back()) pool_.Give(std::move(blocks_.back()));
      return half;
    });
    Time("take where others were", [&] {
      while (auto block = pool_.Take(Shape())) blocks_.push_back(std::move(*block));
      return blocks_.size() - half;
    });
    std::vector<UnitBlock> shares;
    shares.reserve(blocks_.size());
    Time("share", [&] {
      for (const UnitBlock& block : blocks_) shares.push_back(pool_.Share(block));
      return shares.size();
    });
    Time("cut a shared block", [&] {
      for (UnitBlock& block : shares) pool_.Cut(&block, Lower(block));
      return shares.size();
    });
    Time("give a share", [&] {
      for (UnitBlock& block : shares) pool_.Give(std::move(block));
      return shares.size();
    });
    Time("cut", [&] {
      for (UnitBlock& block : blocks_) pool_.Cut(&block, Lower(block));
      return blocks_.size();
    });
    const uint64_t stranded = pool_.stranded_bytes();
    std::vector<RunMove> moves;
    Time("compact, for each run moved", [&] {
      pool_.Compact(&moves);
      return std::max<size_t>(moves.size(), 1);
    });
    Time("follow", [&] {
      for (UnitBlock& block : blocks_) pool_.Follow(&block);
      return blocks_.size();
    });
    const absl::Status status = pool_.CheckIntegrity();
    STRAIT_CHECK(status.ok());
    std::printf("%zu blocks; cuts left %.2f %% of the pool stranded, compacted %.4f %%\n",
                blocks_.size(), Percent(stranded), Percent(pool_.stranded_bytes()));
  }

 private:
  template <class Work>  // returns the number of operations
  void Time(const char* name, Work work) {
    const auto begin = std::chrono::steady_clock::now();
    const size_t count = work();
    const auto spent = std::chrono::steady_clock::now() - begin;
    std::printf("%-28s %7.0f ns\n", name,
                std::chrono::duration<double, std::nano>(spent).count() / double(count));
  }

  BlockShape Shape() { return {kFormats[rng_() % 3], static_cast<uint32_t>(1 + rng_() % 32) * 16}; }
  uint32_t Lower(const UnitBlock& block) {
    return static_cast<uint32_t>(1 + rng_() % (block.shape.rank / 16)) * 16;
  }
  double Percent(uint64_t bytes) const {
    return 100 * double(bytes) / (double(pool_.size()) * UnitBytes(64));
  }

  UnitPool pool_;
  std::vector<UnitBlock> blocks_;
  std::mt19937 rng_{1};
};

void PrintPadding() {
  std::printf("\npadding      rope  ranks       mean    most (rank)\n");
  for (const auto& [rope, max_rank] : {std::pair(64u, 512u), {16u, 128u}}) {
    for (uint32_t f = 0; f < kNumRowFormats; ++f) {
      const auto format = static_cast<RowFormat>(f);
      double sum = 0;
      double most = 0;
      uint32_t most_rank = 0;
      for (uint32_t rank = 16; rank <= max_rank; rank += 16) {
        const BlockUnits block({format, rank}, rope);
        const double share = 100 * double(block.padded_bytes()) / double(block.bytes());
        sum += share;
        if (share > most) most_rank = rank;
        most = std::max(most, share);
      }
      std::printf("%-12s %4u  16..%-4u  %5.2f %%  %5.2f %% (%u)\n", RowFormatName(format), rope,
                  max_rank, sum / (max_rank / 16), most, most_rank);
    }
  }
}

}  // namespace
}  // namespace strait

int main(int argc, char** argv) {
  const bool smoke = argc == 2 && std::strcmp(argv[1], "--smoke") == 0;
  if (argc > 1 && !smoke) {
    std::fprintf(stderr, "usage: %s [--smoke]\n", argv[0]);
    return 2;
  }
  strait::Bench(smoke ? 1000 : 1u << 17).Run();
  strait::PrintPadding();
  return 0;
}
