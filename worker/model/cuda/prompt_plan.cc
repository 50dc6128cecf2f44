// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/prompt_plan.h"

#include <algorithm>

#include "proto/base/check.h"

namespace strait {
namespace {

// Fills launches one after the other.
class Packer {
 public:
  Packer(int32_t key_rows, PromptPlan* plan) : key_rows_(key_rows), plan_(*plan) {}

  void Add(const cuda::MlaSequence& sequence) {
    const int32_t all = sequence.first_position + sequence.num_tokens;
    // Not in spans, if it fits into a launch.
    if (all <= key_rows_ && all > key_rows_ - used_) Close();
    for (int32_t position = 0; position < all;) {
      const auto in_launch = static_cast<int32_t>(plan_.pieces.size()) - plan_.launch_begin.back();
      if (used_ == key_rows_ || in_launch == cuda::kMhaMaxPieces) Close();
      cuda::MhaPiece piece;
      piece.first_token = sequence.first_token;
      piece.num_tokens = sequence.num_tokens;
      piece.first_key = used_;
      piece.num_keys = std::min(all - position, key_rows_ - used_);
      piece.first_position = sequence.first_position - position;
      piece.sequence = sequence.sequence;
      piece.span_position = position;
      piece.begins = position == 0;
      position += piece.num_keys;
      piece.ends = position == all;
      used_ += cuda::MhaKeyRows(piece.num_keys);
      plan_.pieces.push_back(piece);
    }
  }

  void Close() {
    const auto end = static_cast<int32_t>(plan_.pieces.size());
    if (plan_.launch_begin.back() != end) plan_.launch_begin.push_back(end);
    used_ = 0;
  }

 private:
  const int32_t key_rows_;
  PromptPlan& plan_;
  int32_t used_ = 0;  // rows of keys, in the launch under way
};

}  // namespace

absl::Span<const cuda::MhaPiece> PromptPlan::launch(int32_t index) const {
  const auto begin = static_cast<size_t>(launch_begin[static_cast<size_t>(index)]);
  const auto end = static_cast<size_t>(launch_begin[static_cast<size_t>(index) + 1]);
  return absl::MakeConstSpan(pieces).subspan(begin, end - begin);
}

void PlanPrompts(absl::Span<const cuda::MlaSequence> sequences, int32_t key_rows,
                 PromptPlan* plan) {
  STRAIT_CHECK(key_rows % cuda::kMhaTileKeys == 0);
  plan->absorbed.clear();
  plan->absorbed_rows.clear();
  plan->pieces.clear();
  plan->launch_begin = {0};
  Packer packer(key_rows, plan);
  for (const cuda::MlaSequence& sequence : sequences) {
    if (key_rows > 0 && sequence.num_tokens >= kMinExpandedTokens) {
      packer.Add(sequence);
      continue;
    }
    plan->absorbed.push_back(sequence);
    std::vector<RowRange>& rows = plan->absorbed_rows;
    if (rows.empty() || rows.back().begin + rows.back().count != sequence.first_token) {
      rows.push_back({sequence.first_token, 0});
    }
    rows.back().count += sequence.num_tokens;
  }
  packer.Close();
}

}  // namespace strait
