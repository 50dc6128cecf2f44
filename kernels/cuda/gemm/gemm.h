// SPDX-License-Identifier: Apache-2.0
//
// GemmParams: the linear layers, one launch for a dense matrix, for one matrix a head, or for the
// experts that tokens chose:
//   y[m, n] (+)= sum over k of x[row(m), k] * weight[n, k], or, with `up`,
//   y[m, n]    = silu(x[row(m), :] . weight[n, :]) * (x[row(m), :] . up[n, :]).
//
// Thread:  any; asynchronous.
// Stream:  the parameter.
// Shapes:  below; products of bf16 are summed in fp32, of codes within 128 k as the tensor core
//          does. Any of M, N, K may be odd.
// Errors:  none but CUDA's own launch errors, returned.
// Why:     five kernels. "Few rows" reads each weight once for up to 16 rows, through rings in
//          shared memory from which lanes take tensor-core fragments, warps splitting K: bound by
//          memory. "Tiles" is the classical tiled product through shared memory, for any device;
//          "Hopper" the same with warpgroup products, fed by warps of their own, on sm_90; "cluster"
//          that with two blocks for 256 rows that load their weights once for both, for bf16 weights
//          and as many rows; "W8A8" multiplies codes of x with codes of the weight, on sm_90, for
//          any number of rows.
//          Order of sums: in the few-rows kernel it is a property of K and the format alone;
//          fixed_order uses it for any number of rows, so that a row's bits do not depend on the
//          others. The others go through K in order, and so a row's bits depend on which of the
//          kernels, and how many shares of K, the number of rows asks for. W8A8 has one form of
//          tile: in a fixed order, where K is one share, it makes a row's bits from that row
//          alone, too.
//          fp8 weights keep their codes up to the tensor core (e4m3 fits in bf16) and sums are
//          scaled every 128 k, so nothing is rounded twice. Activations stay bf16 (W8A16) unless
//          the caller has quantized them: x_codes. That doubles the tensor core's rate and halves
//          what is copied of x, for products that are bound by either; few rows are bound by
//          reading weights, and gain nothing (WorthQuantizing).
//          Dense bf16 products do not go to cuBLASLt: an epilogue that adds to fp32, or makes gated
//          pairs, is a pass of its own there, its choice of kernels depends on the number of rows,
//          and it brings hundreds of MB of library for what the experts' product must do anyway.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/gemm/matrix.h"

namespace strait::cuda {

// Rows [begin, begin + count) of x (or of x_rows) and y that go through group `group`.
struct RowTile {
  int32_t group;
  int32_t begin;
  int32_t count;
};

struct GemmParams {
  const Bf16* x = nullptr;  // [*, K], rows x_stride apart, 16-byte aligned
  // [*, K] e4m3, 16-byte aligned, and [*, ceil(K/128)], of the same rows: read instead of x, by the
  // W8A8 kernel (MultipliesCodes), with fp8 weights in one group or a list of tiles; else null.
  const uint8_t* x_codes = nullptr;
  const float* x_scales = nullptr;
  int64_t x_stride = 0;             // elements, multiple of 8; of codes: of 16
  int64_t x_group_stride = 0;       // elements, multiple of 8
  const int32_t* x_rows = nullptr;  // [M] row of x that makes row m of y; may be null
  int32_t num_rows = 0;             // M, in every group; ignored with tiles
  Matrix weight;                    // [N, K], of group 0
  Matrix up;                        // [N, K] or empty
  int32_t num_groups = 1;
  int64_t weight_group_stride = 0;  // elements between the weights of groups; `up` has the same
  int64_t scale_group_stride = 0;

  // The rows of each group as a list on the device; null: every group has all num_rows.
  const RowTile* tiles = nullptr;      // [*num_tiles], each of at most tile_rows rows
  const int32_t* num_tiles = nullptr;  // on the device
  int32_t max_tiles = 0;               // what *num_tiles never exceeds
  // The launch right before this one is Gemm's by the same list, of few rows as this one: the list is
  // read while that one ends.
  bool list_again = false;
  // The list's first tiles, where the host knows them: `known`, then the groups and rows after it, as
  // many rows each. Reading their weights begins before the list is there.
  RowTile known = {};
  int32_t num_known = 0;
  // ExpertTileRows(), or another of 8, 16, 32, 64, 128; with x_codes kCodeTileRows. Only
  // ExpertTileRows() knows where kClusterTileRows may be; they are not for `portable`.
  int32_t tile_rows = 0;

  // Room for partial sums, for products of few rows and columns that must split K to fill the
  // device; may be null. Not used with a fixed order.
  float* split_sums = nullptr;
  int64_t split_capacity = 0;  // floats
  int32_t num_splits = 1;      // set by Gemm

  Bf16* y_bf16 = nullptr;  // exactly one of the two; with `up` the first
  float* y_fp32 = nullptr;
  int64_t y_stride = 0;
  int64_t y_group_stride = 0;
  bool accumulate = false;   // y_fp32 += instead of =
  bool fixed_order = false;  // above: Why
  // Only the kernels that run on any device. STRAIT_CUDA_GEMM=portable in the environment means it
  // for all products of the process: to compare, and to do without a kernel that is suspected.
  bool portable = false;
};

cudaError_t Gemm(const GemmParams& params, cudaStream_t stream);

// Both, in one launch where they are alike (few rows, one group, one weight format): what reads the
// same x. Outputs do not overlap.
cudaError_t GemmPair(const GemmParams& a, const GemmParams& b, cudaStream_t stream);

// Rows of a tile for a list of experts' rows: few rows an expert, small tiles.
int32_t ExpertTileRows(int64_t num_choices, int64_t num_experts, bool fp8, bool fixed_order);

inline constexpr int32_t kCodeTileRows = 128;  // of a list's tiles with x_codes
inline constexpr int32_t kClusterTileRows = 256;

// Whether the current device has the product of codes with codes.
bool MultipliesCodes();

// Whether a product of so many rows gains by x as codes: where a tiled kernel makes it otherwise. In a
// fixed order the number of rows may not decide: always.
bool WorthQuantizing(int64_t num_rows, bool fixed_order);
// The same of the products of experts.
bool WorthQuantizingExperts(int64_t num_choices, int64_t num_experts, bool fixed_order);

}  // namespace strait::cuda
