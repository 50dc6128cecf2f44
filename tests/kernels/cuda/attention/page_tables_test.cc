// SPDX-License-Identifier: Apache-2.0
//
// Defends: entries of pieces of all sizes go where they belong, in every layer, and nothing else is
// touched.
#include "kernels/cuda/attention/page_tables.h"

#include <algorithm>
#include <numeric>

#include "tests/kernels/cuda/gpu_test.h"

namespace strait::cuda {
namespace {

using gpu_test::Buffer;

class CudaPageTablesTest : public gpu_test::GpuTest {
 protected:
  // Appends `counts[i]` entries to the tables of sequence i and looks at all of the tables' memory.
  void ExpectAppended(const std::vector<uint32_t>& counts, int32_t num_layers) {
    kernel_test::Rng rng(kernel_test::Seed());
    const auto layers = static_cast<int64_t>(num_layers);
    // Places follow each other in another order than the pieces.
    std::vector<size_t> order(counts.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::shuffle(order.begin(), order.end(), rng);
    std::vector<PageTablePiece> pieces(counts.size());
    std::vector<uint32_t> entries;
    int64_t end = 0;
    for (const size_t i : order) {
      PageTablePiece& piece = pieces[i];
      const auto known = static_cast<uint32_t>(rng() % 5);
      piece.stride = known + counts[i] + static_cast<uint32_t>(rng() % 5);
      piece.first = end + known;
      piece.count = counts[i];
      end += piece.stride * layers;
    }
    std::vector<uint32_t> tables(static_cast<size_t>(end));
    for (uint32_t& entry : tables) entry = static_cast<uint32_t>(rng());
    const Buffer<uint32_t> device_tables(tables);
    for (PageTablePiece& piece : pieces) {
      piece.source = static_cast<int64_t>(entries.size());
      for (int64_t layer = 0; layer < layers; ++layer) {
        for (uint32_t i = 0; i < piece.count; ++i) {
          entries.push_back(static_cast<uint32_t>(rng()));
          tables[static_cast<size_t>(piece.first + layer * piece.stride + i)] = entries.back();
        }
      }
    }
    const Buffer<PageTablePiece> device_pieces(pieces);
    const Buffer<uint32_t> device_entries(entries);
    PageTableParams p;
    p.pieces = device_pieces.data();
    p.entries = device_entries.data();
    p.tables = device_tables.data();
    p.num_pieces = static_cast<int32_t>(pieces.size());
    p.num_layers = num_layers;
    p.max_count = *std::max_element(counts.begin(), counts.end());
    ASSERT_EQ(AppendToPageTables(p, nullptr), cudaSuccess);
    EXPECT_TRUE(device_tables.Get() == tables);
  }
};

TEST_F(CudaPageTablesTest, AnEntryInEachLayerOfManySequences) {
  STRAIT_TRACE_SEED();
  ExpectAppended(std::vector<uint32_t>(40, 1), 61);
}

TEST_F(CudaPageTablesTest, PiecesOfAllSizes) {
  STRAIT_TRACE_SEED();
  ExpectAppended({1, 900, 2, 63, 64, 65, 0, 33}, 3);
  ExpectAppended({2048}, 61);  // 128k tokens
  ExpectAppended({7}, 1);
}

TEST_F(CudaPageTablesTest, WhatIsRefused) {
  PageTableParams p;
  EXPECT_EQ(AppendToPageTables(p, nullptr), cudaSuccess) << "nothing to do";
  p.num_pieces = kMaxPageTablePieces + 1;
  EXPECT_EQ(AppendToPageTables(p, nullptr), cudaErrorInvalidValue);
  p.num_pieces = -1;
  EXPECT_EQ(AppendToPageTables(p, nullptr), cudaErrorInvalidValue);
  p.num_pieces = 1;
  p.num_layers = -1;
  EXPECT_EQ(AppendToPageTables(p, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace strait::cuda
