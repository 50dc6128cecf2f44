// SPDX-License-Identifier: Apache-2.0
//
// A warp a piece. XXH3 keeps eight sums over stripes of 64 bytes; a lane has word `lane % 8` of the stripes
// `lane / 8`, four further and so on, of a round of 16 stripes. Within a round sums are plain additions, so lanes add
// theirs up and meet at the round's end, where the sums are scrambled. The next round's words are read before that.
#include "kernels/cuda/rowwise/checksum.h"

#include <cstring>

#include "kernels/cuda/device/common.cuh"

namespace strait::cuda {
namespace {

using U64 = unsigned long long;  // NOLINT: CUDA's shuffles know it

constexpr int kWarps = 4;  // a block
constexpr int kStripeBytes = 64;
constexpr int kRoundStripes = 16;
constexpr int kRoundBytes = kStripeBytes * kRoundStripes;
constexpr int kEach = kRoundStripes / 4;  // stripes of a lane in a round

// The algorithm's own.
constexpr U64 kPrime32A = 0x9E3779B1u;
constexpr U64 kPrime32B = 0x85EBCA77u;
constexpr U64 kPrime32C = 0xC2B2AE3Du;
constexpr U64 kPrime64A = 0x9E3779B185EBCA87u;
constexpr U64 kPrime64B = 0xC2B2AE3D27D4EB4Fu;
constexpr U64 kPrime64C = 0x165667B19E3779F9u;
constexpr U64 kPrime64D = 0x85EBCA77C2B2AE63u;
constexpr U64 kPrime64E = 0x27D4EB2F165667C5u;
constexpr U64 kLastPrime = 0x165667919E3779F9u;

__device__ U64 FirstSum(int word) {
  constexpr U64 kSums[8] = {kPrime32C, kPrime64A, kPrime64B, kPrime64C,
                            kPrime64D, kPrime32B, kPrime64E, kPrime32A};
  return kSums[word];
}

// What word `value` adds to its own sum, with its key.
__device__ U64 Product(U64 value, U64 key) {
  const U64 mixed = value ^ key;
  return (mixed & 0xffffffffu) * (mixed >> 32);
}

// Sums over the four groups of lanes, in all of them.
__device__ U64 OverGroups(U64 mine) {
  mine += __shfl_xor_sync(kFullWarp, mine, 8);
  mine += __shfl_xor_sync(kFullWarp, mine, 16);
  return mine;
}

__device__ U64 Fold(U64 a, U64 b) {
  const U64 a_low = a & 0xffffffffu;
  const U64 a_high = a >> 32;
  const U64 b_low = b & 0xffffffffu;
  const U64 b_high = b >> 32;
  const U64 low = a_low * b_low;
  const U64 cross = a_high * b_low + (low >> 32);
  const U64 middle = a_low * b_high + (cross & 0xffffffffu);
  return ((middle << 32) | (low & 0xffffffffu)) ^
         (a_high * b_high + (cross >> 32) + (middle >> 32));
}

struct Lane {
  int word;
  int group;
};

// Of stripes below `num_stripes` of a round: what they add to this lane's sum.
__device__ U64 RoundSum(const U64 (&values)[kEach], int num_stripes, Lane lane,
                        const ChecksumSecret& secret) {
  U64 own = 0;
  U64 neighbours = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int stripe = lane.group + 4 * i;
    if (stripe >= num_stripes) break;
    own += Product(values[i], secret.words[stripe + lane.word]);
    neighbours += values[i];
  }
  return OverGroups(own + __shfl_xor_sync(kFullWarp, neighbours, 1));
}

__device__ void Read(const U64* from, int num_stripes, Lane lane, U64 (&values)[kEach]) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int stripe = lane.group + 4 * i;
    values[i] = stripe < num_stripes ? from[stripe * 8 + lane.word] : 0;
  }
}

__global__ void __launch_bounds__(kWarps * 32)
    ChecksumPieces(const __grid_constant__ ChecksumParams p) {
  __shared__ ChecksumSecret secret;
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(secret) / 8); i += kWarps * 32) {
    reinterpret_cast<uint64_t*>(&secret)[i] = reinterpret_cast<const uint64_t*>(&p.secret)[i];
  }
  __syncthreads();
  StartNext();
  WaitForEarlier();
  const int index = blockIdx.x * kWarps + threadIdx.x / 32;
  if (index >= p.num_pieces) return;
  const ChecksumPiece piece = p.pieces[index];
  const Lane lane{static_cast<int>(threadIdx.x % 8), static_cast<int>(threadIdx.x % 32 / 8)};
  const auto* const data = reinterpret_cast<const U64*>(p.data + piece.offset);
  const int64_t num_rounds = (piece.bytes - 1) / kRoundBytes;
  const int rest =
      static_cast<int>((piece.bytes - 1 - num_rounds * kRoundBytes) / kStripeBytes);  // stripes
  U64 sum = FirstSum(lane.word);
  U64 next[kEach];
  Read(data, num_rounds > 0 ? kRoundStripes : rest, lane, next);
  for (int64_t round = 0; round < num_rounds; ++round) {
    U64 values[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) values[i] = next[i];
    Read(data + (round + 1) * (kRoundBytes / 8), round + 1 < num_rounds ? kRoundStripes : rest,
         lane, next);
    sum += RoundSum(values, kRoundStripes, lane, secret);
    sum ^= sum >> 47;
    sum ^= secret.words[kRoundStripes + lane.word];
    sum *= kPrime32A;
  }
  sum += RoundSum(next, rest, lane, secret);
  const U64 tail = data[piece.bytes / 8 - 8 + lane.word];
  sum += Product(tail, secret.last[lane.word]) + __shfl_xor_sync(kFullWarp, tail, 1);
  // Pairs of sums are folded, and the folds added up.
  const U64 keyed = sum ^ secret.merge[lane.word];
  U64 folded = Fold(keyed, __shfl_xor_sync(kFullWarp, keyed, 1));
  folded += __shfl_xor_sync(kFullWarp, folded, 2);
  folded += __shfl_xor_sync(kFullWarp, folded, 4);
  U64 made = static_cast<U64>(piece.bytes) * kPrime64A + folded;
  made ^= made >> 37;
  made *= kLastPrime;
  made ^= made >> 32;
  if (threadIdx.x % 32 == 0) p.sums[index] = made;
}

}  // namespace

ChecksumSecret MakeChecksumSecret(const unsigned char* secret) {
  ChecksumSecret made;
  std::memcpy(made.words, secret, sizeof(made.words));
  std::memcpy(made.last, secret + kChecksumSecretBytes - kStripeBytes - 7, sizeof(made.last));
  std::memcpy(made.merge, secret + 11, sizeof(made.merge));
  return made;
}

cudaError_t Checksum(const ChecksumParams& p, cudaStream_t stream) {
  if (p.num_pieces == 0) return cudaSuccess;
  if (p.num_pieces < 0 || p.data == nullptr || p.pieces == nullptr || p.sums == nullptr ||
      reinterpret_cast<uintptr_t>(p.data) % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  const dim3 grid(static_cast<unsigned>((p.num_pieces + kWarps - 1) / kWarps));
  return LaunchChained(ChecksumPieces, grid, kWarps * 32, 0, stream, p);
}

}  // namespace strait::cuda
