// SPDX-License-Identifier: Apache-2.0
//
// ExpertRows: tokens dealt to experts as a product by a list takes them, raggedly: to an expert none, a
// few, or more than a tile of 128 rows, or the numbers given. Behind the list's end there are wild tiles.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels/cuda/gemm/gemm.h"
#include "tests/kernels/cuda/gpu_test.h"

namespace strait::gpu_test {

class ExpertRows {
 public:
  ExpertRows(kernel_test::Rng& rng, int num_experts, int64_t num_tokens, int32_t tile_rows)
      : ExpertRows(rng, Ragged(num_experts), num_tokens, tile_rows) {}

  ExpertRows(kernel_test::Rng& rng, const std::vector<int>& counts, int64_t num_tokens,
             int32_t tile_rows)
      : num_experts_(static_cast<int>(counts.size())), tile_rows_(tile_rows) {
    std::vector<cuda::RowTile> tiles;
    for (int e = 0; e < num_experts_; ++e) {
      const int count = counts[static_cast<size_t>(e)];
      begin_.push_back(rows());
      for (int i = 0; i < count; i += tile_rows) {
        tiles.push_back({e, begin_.back() + i, std::min(tile_rows, count - i)});
      }
      for (int i = 0; i < count; ++i) {
        token_of_.push_back(static_cast<int32_t>(rng() % static_cast<uint64_t>(num_tokens)));
      }
    }
    begin_.push_back(rows());
    const auto num_tiles = static_cast<int32_t>(tiles.size());
    for (int wild = 0; wild < 40; ++wild) tiles.push_back({1 << 30, -1 << 30, 1 << 30});
    tiles_.emplace(tiles);
    num_tiles_.emplace(std::vector<int32_t>{num_tiles});
    tokens_.emplace(token_of_);
  }

  int32_t rows() const { return static_cast<int32_t>(token_of_.size()); }

  // The list, and which row of x makes a row.
  void Set(cuda::GemmParams* p) const {
    p->num_groups = num_experts_;
    p->tiles = tiles_->data();
    p->num_tiles = num_tiles_->data();
    p->max_tiles = static_cast<int32_t>(tiles_->count());
    p->tile_rows = tile_rows_;
    p->x_rows = tokens_->data();
  }

  // Calls check(expert, rows, x of its rows, y of its rows) for every expert that has some.
  template <class Check>
  void ForEach(const std::vector<float>& x, int64_t k, const std::vector<float>& y, int64_t n,
               const Check& check) const {
    for (int e = 0; e < num_experts_; ++e) {
      const int32_t begin = begin_[static_cast<size_t>(e)];
      const int32_t end = begin_[static_cast<size_t>(e) + 1];
      if (begin == end) continue;
      std::vector<float> own_x;
      for (int32_t r = begin; r < end; ++r) {
        const auto at = x.begin() + token_of_[static_cast<size_t>(r)] * k;
        own_x.insert(own_x.end(), at, at + k);
      }
      check(e, int64_t{end - begin}, own_x,
            std::vector<float>(y.begin() + begin * n, y.begin() + end * n));
    }
  }

 private:
  static std::vector<int> Ragged(int num_experts) {
    std::vector<int> counts;
    for (int e = 0; e < num_experts; ++e) counts.push_back(e % 3 == 0 ? 0 : e % 3 == 1 ? 3 : 150);
    return counts;
  }

  const int num_experts_;
  const int32_t tile_rows_;
  std::vector<int32_t> token_of_;
  std::vector<int32_t> begin_;  // [num_experts + 1] first row of an expert
  std::optional<Buffer<cuda::RowTile>> tiles_;
  std::optional<Buffer<int32_t>> num_tiles_;
  std::optional<Buffer<int32_t>> tokens_;
};

}  // namespace strait::gpu_test
