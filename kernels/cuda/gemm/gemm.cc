// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/gemm/gemm.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "kernels/cuda/attention/latent.h"
#include "kernels/cuda/device/device.h"
#include "kernels/cuda/gemm/gemm_internal.h"
#include "proto/base/check.h"

namespace strait::cuda {
namespace {

constexpr int32_t kFewRows = 16;     // up to here the few-rows kernel, beyond it tiles
constexpr int32_t kLargeTile = 128;  // rows of the tiled kernels
constexpr int32_t kSmallTile = 64;
constexpr int32_t kTileColumns = 128;
constexpr int64_t kWantedBlocks = 128;  // of the tiled kernel, to be worth the device
constexpr int32_t kMaxSplits = 16;
constexpr int32_t kHopperDepth = 256;  // least K: below it the ring of stages does not fill
// What a column costs in tiles of 128 columns, in hundredths of one in tiles of 256: rows of x are
// copied twice as often.
constexpr int64_t kNarrowCost = 115;
// And in the cluster kernel's tiles: two thirds of what else comes from L2, and the rest of a step.
constexpr int64_t kClusterCost = 72;
// Experts with more rows than this in the mean go to it. Two blocks at kClusterCost cost 1.44 of a
// tile of 128 rows: an expert with up to 128 rows loses 0.44 of one, one with up to 256 saves 0.56,
// one with up to 384 saves 0.12 and with up to 512 1.12. Where the mean is 128 half of them lose, and
// the others, which have most of the rows, save more.
constexpr int64_t kClusterMeanRows = 128;
constexpr GemmPlan kClusterPlan = {GemmKind::kCluster, kClusterTileRows, kClusterColumns, 1};

// Rows of a tile of the few-rows kernel at most, as many as one takes when the order of sums is fixed.
// In how large a tile a row lies changes none of its bits.
int32_t MostFewRows() { return DeepGemmRings() ? 32 : 16; }

int32_t FewRowsTile(int32_t num_rows) {
  int32_t tile = 8;
  while (tile < num_rows && tile < MostFewRows()) tile *= 2;
  return tile;
}

void Check(const GemmParams& p) {
  STRAIT_CHECK((p.y_bf16 == nullptr) != (p.y_fp32 == nullptr), "one output");
  STRAIT_CHECK(p.up.empty() || p.y_bf16 != nullptr, "gated products are bf16");
  STRAIT_CHECK(!p.accumulate || p.y_fp32 != nullptr, "only fp32 accumulates");
  if (p.x_codes != nullptr) {
    STRAIT_CHECK(p.x_scales != nullptr && p.weight.scales != nullptr, "codes are times codes");
    STRAIT_CHECK(p.x_stride % 16 == 0 && reinterpret_cast<uintptr_t>(p.x_codes) % 16 == 0);
    STRAIT_CHECK(p.tiles != nullptr ? p.tile_rows == kCodeTileRows : p.num_groups == 1);
  }
  STRAIT_CHECK(p.x_stride % 8 == 0 && p.x_group_stride % 8 == 0);
  STRAIT_CHECK(reinterpret_cast<uintptr_t>(p.x) % 16 == 0);
  STRAIT_CHECK(reinterpret_cast<uintptr_t>(p.weight.data) % 16 == 0);
  STRAIT_CHECK(p.weight.stride % kMatrixAlign == 0 && p.weight.stride >= p.weight.cols);
  STRAIT_CHECK(p.up.empty() || (p.up.rows == p.weight.rows && p.up.cols == p.weight.cols &&
                                p.up.stride == p.weight.stride &&
                                (p.up.scales == nullptr) == (p.weight.scales == nullptr)));
}

// Rows a tile of the few-rows kernel; 0: too many rows for it, or x as codes.
int32_t FewRowsTileOf(const GemmParams& p) {
  if (p.x_codes != nullptr || (p.num_rows > kFewRows && !p.fixed_order)) return 0;
  return FewRowsTile(p.num_rows);
}

bool CanSplit(const GemmParams& p) {
  return p.split_sums != nullptr && p.tiles == nullptr && p.num_groups == 1 && p.up.empty();
}

// Into how many shares K is cut, so that a product of few outputs fills the device.
int32_t NumSplits(const GemmParams& p, int64_t blocks, int64_t wanted) {
  if (!CanSplit(p)) return 1;
  int64_t splits = std::min<int64_t>(wanted / blocks, p.weight.cols / (2 * kScaleBlock));
  splits = std::min(splits, p.split_capacity / (int64_t{p.num_rows} * p.weight.rows));
  return static_cast<int32_t>(std::clamp<int64_t>(splits, 1, kMaxSplits));
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The same for Hopper's kernels. Partial sums go through L2 twice: no more of
// them than the weight has bytes.
int32_t HopperSplits(const GemmParams& p, int64_t units, int32_t multiprocessors) {
  const int64_t weight_bytes = int64_t{p.weight.cols} * (p.weight.scales != nullptr ? 1 : 2);
  const int64_t worth = weight_bytes / (4 * int64_t{std::max(p.num_rows, 1)});
  return std::min(NumSplits(p, units, multiprocessors),
                  static_cast<int32_t>(std::clamp<int64_t>(worth, 1, kMaxSplits)));
}

// Whether the cluster kernel takes it: tensor maps want strides of 16 bytes.
bool FitsCluster(const GemmParams& p) {
  return p.weight.scales == nullptr && (p.num_groups == 1 || p.weight_group_stride % 8 == 0);
}

// Tiles of 256 columns use L2 better, those of 128 fill the last round better. Clusters use it best,
// where both blocks have rows and K need not be cut.
GemmPlan PlanHopper(const GemmParams& p, int32_t tile_rows, int32_t multiprocessors) {
  GemmPlan best = {GemmKind::kHopper, tile_rows, 0, 1};
  int64_t best_cost = 0;
  const bool fp8 = p.weight.scales != nullptr;
  for (const int32_t columns : {256, 128}) {
    if (columns == 256 && fp8) continue;
    const int32_t each = p.up.empty() ? columns : columns / 2;
    const int64_t units = NumItems(p, tile_rows) * CeilDiv(p.weight.rows, each);
    const int32_t splits = HopperSplits(p, units, multiprocessors);
    const int64_t cost = CeilDiv(units * splits, multiprocessors) * columns *
                         (columns == 128 ? kNarrowCost : 100) / splits;
    if (best.columns == 0 || cost < best_cost) {
      best.columns = columns;
      best.num_splits = splits;
      best_cost = cost;
    }
  }
  // A list of smaller tiles is what it is.
  if (p.tiles != nullptr || best.num_splits > 1 || !FitsCluster(p)) return best;
  const int32_t each = p.up.empty() ? kClusterColumns : kClusterColumns / 2;
  const int64_t units = NumItems(p, kClusterTileRows) * CeilDiv(p.weight.rows, each);
  const int64_t cost =
      CeilDiv(units, std::max(multiprocessors / 2, 1)) * kClusterColumns * kClusterCost;
  return cost < best_cost ? kClusterPlan : best;
}

// One tile; K in shares only where the few of them leave the device idle.
GemmPlan PlanW8A8(const GemmParams& p, int32_t multiprocessors) {
  GemmPlan plan = {GemmKind::kW8A8, kCodeTileRows, kTileColumns, 1};
  if (p.fixed_order) return plan;
  const int32_t each = p.up.empty() ? kTileColumns : kTileColumns / 2;
  const int64_t units = NumItems(p, kCodeTileRows) * CeilDiv(p.weight.rows, each);
  plan.num_splits = HopperSplits(p, units, multiprocessors);
  return plan;
}

// Whether the device has the Hopper kernel and nobody asked for the portable ones.
bool HopperProducts() {
  static const bool available = [] {
    const char* const wanted = std::getenv("STRAIT_CUDA_GEMM");
    return ComputeCapabilityMajor() == 9 &&
           (wanted == nullptr || std::string_view(wanted) != "portable");
  }();
  return available;
}

bool UsesHopper(const GemmParams& p) { return HopperProducts() && !p.portable; }

}  // namespace

bool MultipliesCodes() { return HopperProducts(); }

bool DeepGemmRings() {
  const int major = ComputeCapabilityMajor();
  return major == 0 || major == 9 || major == 10;
}

int Multiprocessors() {
  static const int multiprocessors = [] {
    int device = 0;
    int count = 132;
    if (cudaGetDevice(&device) == cudaSuccess) {
      (void)cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    }
    return count;
  }();
  return multiprocessors;
}

GemmPlan PlanGemm(const GemmParams& p, bool hopper, int32_t multiprocessors) {
  if (p.x_codes != nullptr) return PlanW8A8(p, multiprocessors);
  int32_t tile = p.tile_rows;
  if (p.tiles != nullptr) {
    if (tile == kClusterTileRows) {
      STRAIT_CHECK(hopper && !p.fixed_order && FitsCluster(p), "tiles that no kernel takes");
      return kClusterPlan;
    }
    if (tile < kSmallTile || p.fixed_order) return {GemmKind::kFewRows, tile, 0, 1};
  } else {
    tile = FewRowsTileOf(p);
    if (tile > 0) return {GemmKind::kFewRows, tile, 0, 1};
    tile = p.num_rows <= kSmallTile ? kSmallTile : kLargeTile;
  }
  if (hopper && p.weight.cols >= kHopperDepth) return PlanHopper(p, tile, multiprocessors);
  const int64_t blocks = NumItems(p, tile) * CeilDiv(p.weight.rows, kTileColumns);
  return {GemmKind::kTiles, tile, kTileColumns, NumSplits(p, blocks, kWantedBlocks)};
}

cudaError_t Gemm(const GemmParams& p, cudaStream_t stream) {
  Check(p);
  if (p.tiles != nullptr ? p.max_tiles == 0 : p.num_rows == 0) return cudaSuccess;
  const GemmPlan plan = PlanGemm(p, UsesHopper(p), Multiprocessors());
  GemmParams planned = p;
  planned.num_splits = plan.num_splits;
  switch (plan.kind) {
    case GemmKind::kFewRows:
      return GemmFewRows(planned, plan.tile_rows, stream);
    case GemmKind::kTiles:
      return GemmTiles(planned, plan.tile_rows, stream);
    case GemmKind::kHopper:
      return GemmHopper(planned, plan.tile_rows, plan.columns, stream);
    case GemmKind::kCluster:
      return GemmCluster(planned, stream);
    case GemmKind::kW8A8:
      return MultipliesCodes() ? GemmW8A8(planned, stream) : cudaErrorNotSupported;
  }
  return cudaErrorInvalidValue;
}

cudaError_t GemmPair(const GemmParams& a, const GemmParams& b, cudaStream_t stream) {
  const bool alike = a.tiles == nullptr && b.tiles == nullptr && a.up.empty() && b.up.empty() &&
                     a.num_rows == b.num_rows && a.num_rows > 0 && a.num_groups == 1 &&
                     b.num_groups == 1 && a.fixed_order == b.fixed_order &&
                     (a.weight.scales == nullptr) == (b.weight.scales == nullptr);
  const int32_t tile = alike ? FewRowsTileOf(a) : 0;
  if (tile > 0) {
    Check(a);
    Check(b);
    return GemmFewRowsPair(a, b, tile, stream);
  }
  const cudaError_t error = Gemm(a, stream);
  return error != cudaSuccess ? error : Gemm(b, stream);
}

cudaError_t LatentAppendBeside(const LatentAppendParams& append, const GemmParams& p,
                               cudaStream_t stream) {
  const bool plain = p.tiles == nullptr && p.up.empty() && p.weight.scales == nullptr;
  const int32_t tile = plain && p.num_rows > 0 && p.num_rows <= kFewRows ? FewRowsTileOf(p) : 0;
  if (tile > 0 && (append.format == RowFormat::kBf16 || append.format == RowFormat::kFp8)) {
    Check(p);
    return GemmFewRowsBeside(append, p, tile, stream);
  }
  const cudaError_t error = LatentAppend(append, stream);
  return error != cudaSuccess ? error : Gemm(p, stream);
}

int32_t ExpertTileRows(int64_t num_choices, int64_t num_experts, bool fp8, bool fixed_order) {
  const int64_t mean = num_choices / num_experts;
  if (mean <= 3) return 8;
  if (fixed_order) return mean <= 8 ? 16 : MostFewRows();
  // Reading is the limit, and Hopper's kernel reads bf16 best, though most of a tile is empty.
  if (mean <= 8 && (fp8 || !HopperProducts())) return 16;
  if (mean <= 48) return kSmallTile;
  return mean <= kClusterMeanRows || fp8 || !HopperProducts() ? kLargeTile : kClusterTileRows;
}

bool WorthQuantizing(int64_t num_rows, bool fixed_order) {
  return fixed_order || num_rows > kFewRows;
}

bool WorthQuantizingExperts(int64_t num_choices, int64_t num_experts, bool fixed_order) {
  return fixed_order || ExpertTileRows(num_choices, num_experts, true, false) >= kSmallTile;
}

}  // namespace strait::cuda
