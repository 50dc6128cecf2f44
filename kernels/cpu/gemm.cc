// SPDX-License-Identifier: Apache-2.0
//
// Cuts matrix products into pieces for the threads; the pieces are in gemm_body.h.
#include "kernels/cpu/gemm.h"

#include <algorithm>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/level.h"
#include "proto/base/check.h"

namespace strait::cpu {
namespace {

// A piece of a few rows reads about this many bytes of weights: some ten microseconds, long against
// claiming it and short against a thread that waits for the last one.
constexpr int64_t kDirectPieceBytes = 96 * 1024;
constexpr int64_t kDirectPieceMultiple = 4;  // weight rows that a direct tile takes at once

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Cut {
  int64_t m_block, n_block, m_blocks, n_blocks;
};

Cut CutOf(const GemmParams& p) {
  Cut cut;
  const int64_t n = p.weight.rows;
  if (p.num_rows <= kGemmDirectRows) {
    const int64_t row_bytes =
        std::max<int64_t>(1, p.weight.cols * WeightElementBytes(p.weight.type));
    cut.m_block = std::max<int64_t>(1, p.num_rows);
    cut.n_block = std::max<int64_t>(1, kDirectPieceBytes / row_bytes);
    cut.n_block = CeilDiv(cut.n_block, kDirectPieceMultiple) * kDirectPieceMultiple;
  } else {
    cut.m_block = kGemmPanelM;
    cut.n_block = kGemmPanelN;
  }
  cut.m_blocks = p.num_rows == 0 ? 0 : CeilDiv(p.num_rows, cut.m_block);
  cut.n_blocks = CeilDiv(n, cut.n_block);
  return cut;
}

void Check(const GemmParams& p) {
  STRAIT_CHECK(p.num_rows >= 0 && p.weight.rows >= 0 && p.weight.cols >= 0);
  if (p.num_rows == 0 || p.weight.rows == 0) return;
  STRAIT_CHECK(p.x != nullptr && p.y != nullptr && p.weight.data != nullptr);
  STRAIT_CHECK((p.weight.type == WeightType::kFp8E4m3) == (p.weight.scale_inv != nullptr));
}

}  // namespace

void RunGemms(Context& context, absl::Span<const GemmWork> works) {
  // first[i]: the first piece of work i, so that a piece finds its work by bisection.
  std::vector<Cut> cuts(works.size());
  std::vector<int64_t> first(works.size() + 1, 0);
  for (size_t i = 0; i < works.size(); ++i) {
    Check(works[i].params);
    cuts[i] = CutOf(works[i].params);
    first[i + 1] = first[i] + cuts[i].m_blocks * cuts[i].n_blocks;
  }
  context.pool().ParallelFor(first.back(), [&](int64_t piece, int thread) {
    const size_t i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), piece) -
                                         first.begin() - 1);
    const GemmParams& p = works[i].params;
    const Cut& cut = cuts[i];
    // Neighbouring pieces share their weights' rows, so that a second read finds them in cache.
    const int64_t local = piece - first[i];
    const int64_t m0 = local % cut.m_blocks * cut.m_block;
    const int64_t n0 = local / cut.m_blocks * cut.n_block;
    context.table().gemm(p, works[i].weight_row, m0, std::min(m0 + cut.m_block, p.num_rows), n0,
                         std::min(n0 + cut.n_block, p.weight.rows),
                         context.Scratch(thread, kGemmScratch));
  });
}

void GroupedGemm(Context& context, absl::Span<const GemmParams> groups) {
  std::vector<GemmWork> works;
  works.reserve(groups.size());
  for (const GemmParams& params : groups) works.push_back({params, 0});
  RunGemms(context, works);
}

void Gemm(Context& context, const GemmParams& params) {
  GroupedGemm(context, absl::MakeConstSpan(&params, 1));
}

}  // namespace strait::cpu
