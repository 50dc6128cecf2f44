// SPDX-License-Identifier: Apache-2.0
//
// Defends: pieces of any number and size go byte by byte where they belong, and nothing else is
// touched; what is no multiple of 16 bytes is refused.
#include "kernels/cuda/attention/block_pieces.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "tests/kernels/cuda/gpu_test.h"

namespace strait::cuda {
namespace {

using gpu_test::Buffer;

class CudaBlockPiecesTest : public gpu_test::GpuTest {
 protected:
  static constexpr int64_t kSlot = 12288;  // a piece's share of pool and buffer, at most
  static constexpr int64_t kBytes = kMaxBlockPieces * kSlot;

  CudaBlockPiecesTest() : rng_(kernel_test::Seed()) {}

  std::vector<uint8_t> Noise() {
    std::vector<uint8_t> bytes(kBytes);
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(rng_());
    return bytes;
  }
  // Each piece somewhere in a slot of the pool and in another one of the buffer.
  BlockPiecesParams Pieces(int32_t count) {
    std::vector<int64_t> slots(kMaxBlockPieces);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), rng_);
    BlockPiecesParams p;
    p.num_pieces = count;
    for (int32_t i = 0; i < count; ++i) {
      const auto sixteens = static_cast<int64_t>(rng_() % (kSlot / 16 + 1));
      const int64_t room = kSlot / 16 - sixteens;
      const auto shift = static_cast<int64_t>(rng_() % static_cast<uint64_t>(room + 1));
      p.pieces[i] = {slots[static_cast<size_t>(i)] * kSlot + shift * 16,
                     i * kSlot + (room - shift) * 16, sixteens * 16};
    }
    return p;
  }

  kernel_test::Rng rng_;
};

TEST_F(CudaBlockPiecesTest, BothWays) {
  STRAIT_TRACE_SEED();
  for (const int32_t count : {0, 1, 2, 31, kMaxBlockPieces}) {
    for (const bool gather : {true, false}) {
      std::vector<uint8_t> pool = Noise();
      std::vector<uint8_t> packed = Noise();
      const Buffer<uint8_t> device_pool(pool);
      const Buffer<uint8_t> device_packed(packed);
      BlockPiecesParams p = Pieces(count);
      p.blocks = reinterpret_cast<std::byte*>(device_pool.data());
      p.packed = reinterpret_cast<std::byte*>(device_packed.data());
      ASSERT_EQ(gather ? GatherBlockPieces(p, nullptr) : ScatterBlockPieces(p, nullptr),
                cudaSuccess);
      for (int32_t i = 0; i < count; ++i) {
        uint8_t* const in_pool = pool.data() + p.pieces[i].pool_offset;
        uint8_t* const in_packed = packed.data() + p.pieces[i].packed_offset;
        std::memcpy(gather ? in_packed : in_pool, gather ? in_pool : in_packed,
                    static_cast<size_t>(p.pieces[i].bytes));
      }
      EXPECT_TRUE(device_pool.Get() == pool) << count << " pieces";
      EXPECT_TRUE(device_packed.Get() == packed) << count << " pieces";
    }
  }
}

TEST_F(CudaBlockPiecesTest, WhatIsRefused) {
  const Buffer<uint8_t> memory(4096);
  BlockPiecesParams good;
  good.num_pieces = 1;
  good.pieces[0] = {0, 0, 16};
  good.blocks = good.packed = reinterpret_cast<std::byte*>(memory.data());
  const auto refused = [&](const BlockPiecesParams& p) {
    return GatherBlockPieces(p, nullptr) == cudaErrorInvalidValue &&
           ScatterBlockPieces(p, nullptr) == cudaErrorInvalidValue;
  };
  EXPECT_FALSE(refused(good));
  BlockPiecesParams p = good;
  p.num_pieces = kMaxBlockPieces + 1;
  EXPECT_TRUE(refused(p));
  p = good;
  p.num_pieces = -1;
  EXPECT_TRUE(refused(p));
  for (int64_t BlockPiece::*const field :
       {&BlockPiece::pool_offset, &BlockPiece::packed_offset, &BlockPiece::bytes}) {
    p = good;
    p.pieces[0].*field += 8;
    EXPECT_TRUE(refused(p));
  }
  p = good;
  p.pieces[0].bytes = -16;
  EXPECT_TRUE(refused(p));
  p = good;
  p.packed += 8;
  EXPECT_TRUE(refused(p));
}

}  // namespace
}  // namespace strait::cuda
