// SPDX-License-Identifier: Apache-2.0
//
// ChecksumParams: sums[i] = XXH3-64 of piece i, as libxxhash makes it without a seed.
//
// Stream:  the parameter; asynchronous.
// Shapes:  below; a piece is longer than kChecksumBytesMin, and begins at a multiple of 8 bytes.
// Errors:  CUDA's launch errors; cudaErrorInvalidValue.
// Why:     rows that go from device to device are summed where they lie: over a link to the host they
//          would take longer than over the link to the other device. The algorithm is the published one for long
//          input (xxHash's specification); pieces of a frame are one warp's each, since its 1,024-byte rounds follow
//          each other.
//
// Intensity: two multiplications for 8 bytes, each byte read once: bound by memory, and for few pieces by
// the rounds of a warp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace strait::cuda {

inline constexpr uint32_t kChecksumBytesMin = 240;  // exclusive: what is shorter has another rule
inline constexpr int kChecksumSecretBytes = 192;

struct ChecksumPiece {
  int64_t offset = 0;  // into data, a multiple of 8
  int64_t bytes = 0;   // a multiple of 8, more than kChecksumBytesMin
};

// The words of XXH3's secret, from where it reads them.
struct ChecksumSecret {
  uint64_t words[kChecksumSecretBytes / 8];
  uint64_t last[8];   // for the last stripe
  uint64_t merge[8];  // for the end
};
// `secret`: [kChecksumSecretBytes].
ChecksumSecret MakeChecksumSecret(const unsigned char* secret);

struct ChecksumParams {
  const unsigned char* data = nullptr;    // device
  const ChecksumPiece* pieces = nullptr;  // [num_pieces], that the device reads
  uint64_t* sums = nullptr;               // [num_pieces], that the device writes
  int32_t num_pieces = 0;
  ChecksumSecret secret = {};
};

cudaError_t Checksum(const ChecksumParams& params, cudaStream_t stream);

}  // namespace strait::cuda
