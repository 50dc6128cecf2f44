// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/restore_check.h"

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "tests/sim/oracle.h"

namespace strait::sim {

void RestoreCheck::OnActivate(const v1::ActivateStage& activate) {
  std::map<SequenceId, std::vector<TokenId>>& asked = asked_[activate.stage_id()];
  asked.clear();
  for (const v1::FetchRows& restore : activate.restores()) {
    asked[SequenceId{restore.sequence_id()}].assign(restore.tokens().ids().begin(),
                                                    restore.tokens().ids().end());
  }
}

std::string RestoreCheck::OnActive(const v1::StageState& active, const Stage& stage,
                                   const NumberCache& rows) {
  const auto asked = asked_.find(active.stage_id());
  if (asked == asked_.end() || asked->second.empty()) return "";
  const LayerRange layers = stage.model().spec().layers;
  const LatentCache& cache = stage.cache();
  for (const v1::HeldSequence& held : active.held()) {
    const SequenceId id{held.sequence_id()};
    const auto tokens = asked->second.find(id);
    if (tokens == asked->second.end()) continue;
    const auto text = [&](auto... what) {
      return absl::StrCat("stage ", active.stage_id(), " begins with sequence ", id.value, ": ",
                          what...);
    };
    if (!cache.resident(id) || cache.length(id) != held.rows()) {
      return text("it tells ", held.rows(), " rows, and has others");
    }
    // Of rows of its own it may have more.
    const size_t num = std::min<size_t>(held.rows(), tokens->second.size());
    const auto expected = ExpectRows(absl::MakeConstSpan(tokens->second).first(num), layers);
    const auto tables = cache.PageTables(id);
    for (size_t l = 0; l < layers.size(); ++l) {
      for (size_t p = 0; p < num; ++p) {
        const BlockId block = tables[l][p / limits::kBlockTokens];
        if (rows.Peek(block, p % limits::kBlockTokens) == expected[l][p]) continue;
        return text("row ", p, " of layer ", layers.begin + l, " is another one");
      }
    }
    num_rows_ += num * layers.size();
  }
  asked_.erase(asked);
  return "";
}

}  // namespace strait::sim
