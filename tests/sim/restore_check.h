// SPDX-License-Identifier: Apache-2.0
//
// RestoreCheck holds the rows that a stage begins with, because ActivateStage asked for them, to the oracle: what
// it tells is what it has, and each row is the one that its tokens make.
//
// Thread:  the simulator's.
// Errors:  OnActive says what is wrong.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"
#include "tests/worker/number_cache.h"
#include "worker/stage/stage.h"

namespace strait::sim {

class RestoreCheck {
 public:
  void OnActivate(const v1::ActivateStage& activate);
  // Empty: all is well.
  std::string OnActive(const v1::StageState& active, const Stage& stage, const NumberCache& rows);
  uint64_t num_rows() const { return num_rows_; }  // that were looked at; each layer has its own

 private:
  // Of the newest activation of each stage: the tokens by sequence.
  std::map<uint64_t, std::map<SequenceId, std::vector<TokenId>>> asked_;
  uint64_t num_rows_ = 0;
};

}  // namespace strait::sim
