// SPDX-License-Identifier: Apache-2.0
//
// Products of a weight with few rows: y[m, n] = sum over k of x[m, k] * w[n, k], m up to 32 at once.
//
// A unit of work is 16 outputs of up to 8 * kTokenTiles rows. A team of warps takes pieces of K,
// 128 wide, or 256 of fp8, in turn, and their sums are added in order at the end; all eight warps
// of a block are a team, or two, four or eight teams work on as many units, so that with 11
// pieces (K = 1,408) not five warps of eight sit out every second turn. At most as many blocks as
// run at once take all units; fewer where each team then still has one (NumBlocks). Each warp has a ring of pieces in shared memory, which it fills by
// asynchronous copies, of the next units too, while it multiplies the oldest: 96 KiB and more of
// a multiprocessor are on their way, whatever the sums wait for. Weights are the tensor core's A
// operand: a lane copies and reads 16 contiguous bytes of two rows of W, and reads as many of one
// row of x; that they are other k than the fragment's layout names does not matter, as both
// operands are permuted alike.
//
// Intensity: 2 M flops a weight; 1 byte (fp8) or 2 (bf16) a weight. Limit: reading memory; at M = 32
// x comes from L2 twice as much as W from memory.
// Measured shares: tests/reports/gpu.md, written by tests/gpu.sh.
#include <algorithm>

#include "kernels/cuda/attention/latent_append.cuh"
#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/gemm/gemm_few_rows_piece.cuh"
#include "kernels/cuda/gemm/gemm_launch.cuh"

namespace strait::cuda {
namespace {

using few_rows::CopyPiece;
using few_rows::kRows;
using few_rows::LoadScales;
using few_rows::Multiply;
using few_rows::Piece;
using few_rows::Rows;
using few_rows::Vec;

constexpr int kWarps = kGemmWarps;

// Blocks of a multiprocessor: more rows of x take more registers.
constexpr int BlocksEach(int token_tiles) { return token_tiles == 1 ? 2 : 1; }

// Pieces of a warp's ring. Where a multiprocessor has 228 KiB of shared memory, its blocks take about
// 200 of them; elsewhere two pieces.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1100)
constexpr bool kDeepRing = true;
#else
constexpr bool kDeepRing = false;
#endif
template <int kTokenTiles>
constexpr int RingPieces(bool deep) {
  if (!deep) return 2;
  return kTokenTiles == 1 ? 3 : kTokenTiles == 2 ? 6 : 4;
}

// The warps that work on one unit; a power of two.
struct Team {
  int warps;

  __device__ __forceinline__ Team(int k_end, bool fp8) : warps(WarpsEach(k_end, fp8)) {}
  __device__ __forceinline__ int index() const { return threadIdx.x / 32 / warps; }  // in the block
  __device__ __forceinline__ int warp() const { return threadIdx.x / 32 & (warps - 1); }
  __device__ __forceinline__ int thread() const { return threadIdx.x & (32 * warps - 1); }
  __device__ __forceinline__ int Threads() const { return warps * 32; }
  __device__ __forceinline__ void Sync() const { SyncSome(index() + 1, Threads()); }
};

// Adds the warps' sums in order; leaves them in shared[0].
template <int kTokenTiles>
__device__ __forceinline__ void AddWarps(const Team& team, const float (&sums)[kTokenTiles][4],
                                         float (*shared)[8 * kTokenTiles][kRows + 1]) {
  const int row = threadIdx.x % 32 / 4;
  const int token = threadIdx.x % 4 * 2;
  team.Sync();  // what was there has been read
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
    shared[team.warp()][t * 8 + token][row] = sums[t][0];
    shared[team.warp()][t * 8 + token + 1][row] = sums[t][1];
    shared[team.warp()][t * 8 + token][row + 8] = sums[t][2];
    shared[team.warp()][t * 8 + token + 1][row + 8] = sums[t][3];
  }
  team.Sync();
  for (int i = team.thread(); i < 8 * kTokenTiles * kRows; i += team.Threads()) {
    const int t = i / kRows;
    const int n = i % kRows;
    float sum = shared[0][t][n];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      if (w < team.warps) sum += shared[w][t][n];
    }
    shared[0][t][n] = sum;  // the same thread reads it again
  }
}

// Where a warp is in its team's work: units of 16 rows of W (of both matrices, if gated) for the rows
// of one item; a team takes every num_teams-th.
template <bool kFp8, bool kGated>
struct Cursor {
  static constexpr int kWidth = Piece<kFp8>::kWidth;

  int unit;
  int n0;
  int k0;
  bool up;  // in the second matrix
  GemmItem item;

  __device__ __forceinline__ void Enter(const GemmParams& p, const Team& team, int tile_rows,
                                        int at, bool early = false) {
    const int units_each = (p.weight.rows + kRows - 1) / kRows;
    unit = at;
    n0 = at % units_each * kRows;
    k0 = team.warp() * kWidth;
    up = false;
    item = ItemOf(p, tile_rows, at / units_each, early);
  }
  // To the next piece; false: the team's work is done.
  __device__ __forceinline__ bool Next(const GemmParams& p, const Team& team, int tile_rows,
                                       int num_units, int num_teams, bool early = false) {
    k0 += team.warps * kWidth;
    if (k0 < p.weight.cols) return true;
    if (kGated && !up) {
      up = true;
      k0 = team.warp() * kWidth;
      return true;
    }
    if (unit + num_teams >= num_units) return false;
    Enter(p, team, tile_rows, unit + num_teams, early);
    return true;
  }
  __device__ __forceinline__ const Matrix& matrix(const GemmParams& p) const {
    return kGated && up ? p.up : p.weight;
  }
};

// Fills a warp's ring, piece after piece.
template <bool kFp8, bool kGated, int kPieces>
class Feeder {
 public:
  // `ring`: this lane's 16 bytes of the warp's first slot.
  __device__ __forceinline__ Feeder(const GemmParams& p, const Team& team, int tile_rows,
                                    int num_units, int num_teams, uint32_t ring)
      : p_(p),
        team_(team),
        tile_rows_(tile_rows),
        num_units_(num_units),
        num_teams_(num_teams),
        ring_(ring) {}

  __device__ __forceinline__ void Start(int unit, bool early) {
    at_.Enter(p_, team_, tile_rows_, unit, early);
    Point();
    more_ = true;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) Fill(i, early);
  }
  __device__ __forceinline__ void SetUnits(int num_units) { num_units_ = num_units; }
  // Asks for the next piece, if there is one; a group of copies in any case.
  __device__ __forceinline__ void Fill(int slot, bool early = false) {
    if (more_) {
      CopyPiece<kFp8>(ring_ + slot * Piece<kFp8>::kBytes, rows_.w0, rows_.w1, at_.k0,
                      p_.weight.cols);
      const int unit = at_.unit;
      const bool up = at_.up;
      more_ = at_.Next(p_, team_, tile_rows_, num_units_, num_teams_, early);
      if (more_ && (at_.unit != unit || at_.up != up)) Point();
    }
    CommitCopies();
  }

 private:
  __device__ __forceinline__ void Point() {
    rows_ = Rows<kFp8>(p_, at_.matrix(p_), at_.item.group, at_.n0);
  }

  const GemmParams& p_;
  const Team& team_;
  const int tile_rows_;
  int num_units_;
  const int num_teams_;
  const uint32_t ring_;
  Cursor<kFp8, kGated> at_;
  Rows<kFp8> rows_;
  bool more_ = false;
};

template <int kTokenTiles>
constexpr int SumBytes(bool gated) {
  return (gated ? 2 : 1) * kWarps * 8 * kTokenTiles * (kRows + 1) * 4;
}

// The part of the product p that block `block` of `num_blocks` makes. Every warp of a team goes
// through the same units.
template <bool kFp8, bool kGated, int kTokenTiles>
__device__ __forceinline__ void Block(const GemmParams& p, int block, int num_blocks,
                                      unsigned char* memory) {
  constexpr int kTileRows = 8 * kTokenTiles;
  constexpr int kPieces = RingPieces<kTokenTiles>(kDeepRing);
  constexpr int kPieceBytes = Piece<kFp8>::kBytes;
  const int k_end = p.weight.cols;
  const Team team(k_end, kFp8);
  // Neighbouring units go to different blocks: where there are few, all multiprocessors read.
  const int first = block + num_blocks * team.index();
  const int num_teams = num_blocks * (kWarps / team.warps);
  unsigned char* const ring =
      memory + threadIdx.x / 32 * (kPieces * kPieceBytes) + threadIdx.x % 32 * 16;
  auto* const shared =
      reinterpret_cast<float(*)[kTileRows][kRows + 1]>(memory + kWarps * kPieces * kPieceBytes) +
      team.index() * team.warps;
  const int units_each = (p.weight.rows + kRows - 1) / kRows;
  // Which weights a team reads first is known early unless a new list says it: reading begins before
  // the kernel before has ended. By a list the next kernel begins when this one's turn has come: it
  // may go by the same one, which is whole then.
  const bool by_list = p.tiles != nullptr;
  // A unit of a known tile, of which a ring does not hold all that a warp takes: what comes after the
  // unit need not be known yet.
  const int least_pieces = k_end / Piece<kFp8>::kWidth / team.warps * (kGated ? 2 : 1);
  const bool known = by_list && first < p.num_known * units_each && least_pieces > kPieces;
  const bool early = !by_list || p.list_again || known;
  if (!by_list) StartNext();
  if (!early) WaitForEarlier();
  int num_units = units_each * p.num_known;
  if (!by_list) num_units = units_each * p.num_groups * ((p.num_rows + kTileRows - 1) / kTileRows);
  if (by_list && !known) num_units = units_each * __ldcg(p.num_tiles);
  Feeder<kFp8, kGated, kPieces> feeder(p, team, kTileRows, num_units, num_teams,
                                       SharedAddress(ring));
  if (first < num_units) feeder.Start(first, by_list && early);
  if (early) WaitForEarlier();
  if (by_list) StartNext();
  if (known) {
    num_units = units_each * __ldcg(p.num_tiles);
    feeder.SetUnits(num_units);
  }
  if (first >= num_units) return;
  Cursor<kFp8, kGated> at;
  at.Enter(p, team, kTileRows, first);
  const int token = threadIdx.x % 32 / 4;
  const Bf16* x[kTokenTiles];
  float sums[kGated ? 2 : 1][kTokenTiles][4] = {};
  int x_item = -1;  // whose rows x are
  bool more = true;
  for (int slot = 0; more; slot = slot + 1 == kPieces ? 0 : slot + 1) {
    const GemmItem item = at.item;
    const int unit = at.unit;
    const int n0 = at.n0;
    const int k0 = at.k0;
    const bool up = at.up;
    if (unit / units_each != x_item) {
      x_item = unit / units_each;
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        // Beyond the item's rows its first stands in: such columns of the product go nowhere.
        const int m = t * 8 + token;
        const int index = item.begin + (m < item.count ? m : 0);
        const int64_t row = p.x_rows ? p.x_rows[index] : index;
        x[t] = p.x + item.group * p.x_group_stride + row * p.x_stride;
      }
    }
    constexpr int kScales = Piece<kFp8>::kScales;
    float scales[kScales];
    LoadScales<kFp8>(p, at.matrix(p), item.group, n0, k0, scales);
    more = at.Next(p, team, kTileRows, num_units, num_teams);
    float partial[kScales][kTokenTiles][4] = {};
    Multiply<kFp8, kTokenTiles, kPieces - 1>(
        reinterpret_cast<const Vec*>(ring + slot * kPieceBytes), x, k0, k_end, partial);
    feeder.Fill(slot);
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int s = 0; s < kScales; ++s) {
          if (kGated && up) {
            sums[kGated][t][i] = fmaf(partial[s][t][i], scales[s], sums[kGated][t][i]);
          } else {
            sums[0][t][i] = fmaf(partial[s][t][i], scales[s], sums[0][t][i]);
          }
        }
      }
    }
    if (more && at.unit == unit) continue;

    AddWarps<kTokenTiles>(team, sums[0], shared);
    if (kGated) AddWarps<kTokenTiles>(team, sums[kGated], shared + kWarps);
    for (int i = team.thread(); i < kTileRows * kRows; i += team.Threads()) {
      const int m = i / kRows;
      const int n = i % kRows;
      if (m >= item.count || n0 + n >= p.weight.rows) continue;
      float value = shared[0][m][n];
      if (kGated) value = Silu(value) * shared[kWarps][m][n];
      const int64_t to =
          item.group * p.y_group_stride + int64_t{item.begin + m} * p.y_stride + n0 + n;
      if (p.y_bf16 != nullptr) {
        p.y_bf16[to] = __float2bfloat16(value);
      } else {
        p.y_fp32[to] = p.accumulate ? p.y_fp32[to] + value : value;
      }
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][t][i] = sums[kGated][t][i] = 0;
    }
  }
}

template <bool kFp8, bool kGated, int kTokenTiles>
__global__ void __launch_bounds__(kWarps * 32, BlocksEach(kTokenTiles))
    FewRows(const __grid_constant__ GemmParams p) {
  auto* const memory = DynamicShared<unsigned char>();
  Block<kFp8, kGated, kTokenTiles>(p, blockIdx.x, gridDim.x, memory);
}

// Two products of the same number of rows in one launch: the first a_blocks blocks make a.
template <bool kFp8, int kTokenTiles>
__global__ void __launch_bounds__(kWarps * 32, BlocksEach(kTokenTiles))
    FewRowsPair(const __grid_constant__ GemmParams a, const __grid_constant__ GemmParams b,
                const int a_blocks) {
  auto* const memory = DynamicShared<unsigned char>();
  const int block = blockIdx.x;
  if (block < a_blocks) {
    Block<kFp8, false, kTokenTiles>(a, block, a_blocks, memory);
  } else {
    Block<kFp8, false, kTokenTiles>(b, block - a_blocks, gridDim.x - a_blocks, memory);
  }
}

// A product, and beside it the first blocks of a LatentAppend.
template <int kTokenTiles>
__global__ void __launch_bounds__(kWarps * 32, BlocksEach(kTokenTiles))
    FewRowsBeside(const __grid_constant__ LatentAppendParams append,
                  const __grid_constant__ GemmParams p, const int append_parts,
                  const int append_blocks) {
  static_assert(kWarps * 32 == latent::kThreads);
  auto* const memory = DynamicShared<unsigned char>();
  const int block = blockIdx.x;
  if (block < append_blocks) {
    StartNext();
    latent::AppendPart(append, block / append_parts, block % append_parts);
  } else {
    Block<false, false, kTokenTiles>(p, block - append_blocks, gridDim.x - append_blocks, memory);
  }
}

// Blocks that run at once.
template <int kTokenTiles>
int64_t ResidentBlocks() {
  return int64_t{Multiprocessors()} * BlocksEach(kTokenTiles);
}

template <int kTokenTiles>
int64_t NumUnits(const GemmParams& p) {
  return NumItems(p, 8 * kTokenTiles) * ((p.weight.rows + kRows - 1) / kRows);
}

template <bool kFp8, int kTokenTiles>
int SharedBytes(bool gated) {
  return kWarps * RingPieces<kTokenTiles>(DeepGemmRings()) * Piece<kFp8>::kBytes +
         SumBytes<kTokenTiles>(gated);
}

// No more blocks than units, nor than run at once; nor, once they are on half of the multiprocessors,
// than have a unit for each team: the kernel after these, which begins early, needs room.
template <int kTokenTiles>
unsigned NumBlocks(const GemmParams& p) {
  const int64_t units = NumUnits<kTokenTiles>(p);
  const int teams = kWarps / WarpsEach(p.weight.cols, p.weight.scales != nullptr);
  const int64_t busy = std::max<int64_t>((units + teams - 1) / teams, Multiprocessors() / 2);
  return static_cast<unsigned>(std::min({units, busy, ResidentBlocks<kTokenTiles>()}));
}

template <bool kFp8, bool kGated, int kTokenTiles>
cudaError_t Launch(const GemmParams& p, cudaStream_t stream) {
  const dim3 grid(NumBlocks<kTokenTiles>(p));
  const auto kernel = FewRows<kFp8, kGated, kTokenTiles>;
  return LaunchWithShared(kernel, grid, kWarps * 32, SharedBytes<kFp8, kTokenTiles>(kGated), stream,
                          p);
}

template <bool kFp8, int kTokenTiles>
cudaError_t LaunchPair(const GemmParams& a, const GemmParams& b, cudaStream_t stream) {
  // Both at once where they fit; else in proportion.
  const int64_t a_units = NumUnits<kTokenTiles>(a);
  const int64_t b_units = NumUnits<kTokenTiles>(b);
  const int64_t most = ResidentBlocks<kTokenTiles>();
  int64_t a_blocks = a_units;
  int64_t b_blocks = b_units;
  if (a_units + b_units > most) {
    a_blocks = std::clamp<int64_t>(most * a_units / (a_units + b_units), 1, most - 1);
    b_blocks = std::min(b_units, most - a_blocks);
  }
  const dim3 grid(static_cast<unsigned>(a_blocks + b_blocks));
  const auto kernel = FewRowsPair<kFp8, kTokenTiles>;
  return LaunchWithShared(kernel, grid, kWarps * 32, SharedBytes<kFp8, kTokenTiles>(false), stream,
                          a, b, static_cast<int>(a_blocks));
}

// Calls `launch` with the number of token tiles as a constant.
template <class Launcher>
cudaError_t WithTokenTiles(int32_t tile_rows, const Launcher& launch) {
  switch (tile_rows) {
    case 8:
      return launch(std::integral_constant<int, 1>());
    case 16:
      return launch(std::integral_constant<int, 2>());
    case 32:
      return launch(std::integral_constant<int, 4>());
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t GemmFewRowsPair(const GemmParams& a, const GemmParams& b, int32_t tile_rows,
                            cudaStream_t stream) {
  return WithTokenTiles(tile_rows, [&](auto tiles) {
    constexpr int kTokenTiles = decltype(tiles)::value;
    return a.weight.scales != nullptr ? LaunchPair<true, kTokenTiles>(a, b, stream)
                                      : LaunchPair<false, kTokenTiles>(a, b, stream);
  });
}

cudaError_t GemmFewRowsBeside(const LatentAppendParams& append, const GemmParams& p,
                              int32_t tile_rows, cudaStream_t stream) {
  if (append.rank > latent::kThreads * latent::kHeld) return cudaErrorInvalidValue;
  const int parts = latent::AppendParts(append);
  const int append_blocks = static_cast<int>(append.num_tokens) * parts;
  return WithTokenTiles(tile_rows, [&](auto tiles) {
    constexpr int kTokenTiles = decltype(tiles)::value;
    const dim3 grid(NumBlocks<kTokenTiles>(p) + static_cast<unsigned>(append_blocks));
    return LaunchWithShared(FewRowsBeside<kTokenTiles>, grid, kWarps * 32,
                            SharedBytes<false, kTokenTiles>(false), stream, append, p, parts,
                            append_blocks);
  });
}

cudaError_t GemmFewRows(const GemmParams& p, int32_t tile_rows, cudaStream_t stream) {
  return WithForm(p, [&](auto fp8, auto gated) {
    return WithTokenTiles(tile_rows, [&](auto tiles) {
      return Launch<decltype(fp8)::value, decltype(gated)::value, decltype(tiles)::value>(p,
                                                                                          stream);
    });
  });
}

}  // namespace strait::cuda
