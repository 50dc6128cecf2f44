// SPDX-License-Identifier: Apache-2.0
#include "proto/model/cache_tiers.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

absl::Status Check(bool right, const std::string& field, uint64_t value,
                   const std::string& expected) {
  if (right) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("cache tiers: ", field, " is ", value, ", expected ", expected));
}

absl::Status CheckRows(const std::string& field, uint32_t rows, uint32_t least) {
  return Check(
      rows % limits::kBlockTokens == 0 && rows >= least && rows <= limits::kMaxPositionEmbeddings,
      field, rows,
      absl::StrCat("a multiple of 64 from ", least, " to ", limits::kMaxPositionEmbeddings));
}

}  // namespace

absl::StatusOr<CacheTiers> CacheTiers::Create(Spec spec) {
  STRAIT_RETURN_IF_ERROR(Check(HasUnits(spec.rope), "rope", spec.rope,
                               absl::StrCat("a multiple of 16 up to ", limits::kMaxHeadDim)));
  STRAIT_RETURN_IF_ERROR(Check(spec.young.rank > 0 && spec.young.rank <= limits::kMaxLoraRank,
                               "the young rank", spec.young.rank,
                               absl::StrCat("1 to ", limits::kMaxLoraRank)));
  STRAIT_RETURN_IF_ERROR(Check(spec.young.format < RowFormat::kInt4, "the young format",
                               static_cast<uint64_t>(spec.young.format), "fp32, bf16 or fp8"));
  STRAIT_RETURN_IF_ERROR(Check(!spec.old.empty() && spec.old.size() <= limits::kMaxHiddenLayers,
                               "the number of layers", spec.old.size(),
                               absl::StrCat("1 to ", limits::kMaxHiddenLayers)));
  for (size_t layer = 0; layer < spec.old.size(); ++layer) {
    const BlockShape& old = spec.old[layer];
    STRAIT_RETURN_IF_ERROR(Check(old.rank <= spec.young.rank,
                                 absl::StrCat("the old rank of layer ", layer), old.rank,
                                 absl::StrCat("at most the young one, ", spec.young.rank)));
    STRAIT_RETURN_IF_ERROR(Check(static_cast<uint32_t>(old.format) < kNumRowFormats,
                                 absl::StrCat("the old format of layer ", layer),
                                 static_cast<uint64_t>(old.format), "a row format"));
  }
  STRAIT_RETURN_IF_ERROR(CheckRows("sink_rows", spec.sink_rows, 0));
  STRAIT_RETURN_IF_ERROR(CheckRows("young_rows", spec.young_rows, limits::kBlockTokens));
  STRAIT_RETURN_IF_ERROR(CheckRows("interval_rows", spec.interval_rows, limits::kBlockTokens));
  return CacheTiers(std::move(spec));
}

CacheTiers::CacheTiers(Spec spec)
    : spec_(std::move(spec)), young_bytes_(UnitBlockBytes(spec_.young, spec_.rope)) {
  old_bytes_before_.push_back(0);
  for (const BlockShape& old : spec_.old) {
    const uint64_t bytes = old.rank == 0 ? 0 : UnitBlockBytes(old, spec_.rope);
    old_bytes_before_.push_back(old_bytes_before_.back() + bytes);
  }
}

uint64_t CacheTiers::RowsThatFit(uint64_t bytes, LayerRange layers) const {
  // ReservedBytes never falls with the length.
  uint32_t fit = 0;
  uint32_t blocks = limits::kMaxPositionEmbeddings / limits::kBlockTokens;
  while (fit < blocks) {
    const uint32_t middle = fit + (blocks - fit + 1) / 2;
    if (ReservedBytes(middle * limits::kBlockTokens, layers) <= bytes) {
      fit = middle;
    } else {
      blocks = middle - 1;
    }
  }
  return uint64_t{fit} * limits::kBlockTokens;
}

}  // namespace strait
