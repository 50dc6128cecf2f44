// SPDX-License-Identifier: Apache-2.0
//
// Defends: the device's checksum of rows is libxxhash's, at every length around the borders of stripes and rounds, and
// every byte of a piece counts.
#include "kernels/cuda/rowwise/checksum.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstdint>
#include <vector>

#include "tests/kernels/cuda/gpu_test.h"

namespace strait {
namespace {

using gpu_test::Buffer;

class CudaChecksumTest : public gpu_test::GpuTest {
 protected:
  static std::vector<uint64_t> Sums(const std::vector<uint8_t>& data,
                                    const std::vector<cuda::ChecksumPiece>& pieces) {
    const Buffer<uint8_t> d_data(data);
    const Buffer<cuda::ChecksumPiece> d_pieces(pieces);
    const Buffer<uint64_t> d_sums(static_cast<int64_t>(pieces.size()));
    cuda::ChecksumParams p;
    p.data = d_data.data();
    p.pieces = d_pieces.data();
    p.sums = d_sums.data();
    p.num_pieces = static_cast<int32_t>(pieces.size());
    p.secret = cuda::MakeChecksumSecret(XXH3_kSecret);
    EXPECT_EQ(cuda::Checksum(p, nullptr), cudaSuccess);
    return d_sums.Get();
  }
  static std::vector<uint8_t> Bytes(size_t count) {
    kernel_test::Rng rng(kernel_test::Seed());
    std::vector<uint8_t> made(count);
    for (uint8_t& byte : made) byte = static_cast<uint8_t>(rng());
    return made;
  }
};

TEST_F(CudaChecksumTest, AnyLengthIsAsTheLibrarySays) {
  STRAIT_TRACE_SEED();
  std::vector<cuda::ChecksumPiece> pieces;
  int64_t end = 0;
  for (const int64_t bytes : {248, 256, 264, 320, 1008, 1016, 1024, 1032, 1080, 1088, 1096, 2040,
                              2048, 2056, 3000, 3072, 3080, 9216}) {
    pieces.push_back({end, bytes});
    end += bytes + 8;  // pieces need not touch
  }
  const std::vector<uint8_t> data = Bytes(static_cast<size_t>(end));
  const std::vector<uint64_t> sums = Sums(data, pieces);
  for (size_t i = 0; i < pieces.size(); ++i) {
    EXPECT_EQ(sums[i], XXH3_64bits(&data[static_cast<size_t>(pieces[i].offset)],
                                   static_cast<size_t>(pieces[i].bytes)))
        << pieces[i].bytes << " bytes";
  }
}

TEST_F(CudaChecksumTest, EveryWordCounts) {
  STRAIT_TRACE_SEED();
  constexpr int64_t kBytes = 38 * 56;
  std::vector<uint8_t> data;
  std::vector<cuda::ChecksumPiece> pieces;
  const std::vector<uint8_t> plain = Bytes(kBytes);
  for (int64_t at = 0; at <= kBytes; at += 56) {  // the last is as it was
    pieces.push_back({static_cast<int64_t>(data.size()), kBytes});
    data.insert(data.end(), plain.begin(), plain.end());
    if (at < kBytes) data[data.size() - kBytes + static_cast<size_t>(at)] ^= 1;
  }
  const std::vector<uint64_t> sums = Sums(data, pieces);
  EXPECT_EQ(sums.back(), XXH3_64bits(plain.data(), kBytes));
  for (size_t i = 0; i + 1 < sums.size(); ++i)
    EXPECT_NE(sums[i], XXH3_64bits(plain.data(), kBytes));
}

TEST_F(CudaChecksumTest, WhatCannotBeIsRefused) {
  cuda::ChecksumParams p;
  EXPECT_EQ(cuda::Checksum(p, nullptr), cudaSuccess) << "no piece";
  p.num_pieces = 1;
  EXPECT_EQ(cuda::Checksum(p, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace strait
