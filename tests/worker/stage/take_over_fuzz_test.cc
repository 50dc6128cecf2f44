// SPDX-License-Identifier: Apache-2.0
//
// Defends: what TakeOverTest does, for cuts, orders and delays at random.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "tests/worker/stage/take_over_fixture.h"

namespace strait {
namespace {

using Held = std::map<uint64_t, uint32_t>;

// A pipeline that is cut anew again and again, its stages each as many steps behind as it happens.
class TakeOverFuzzTest : public TakeOverTest, public testing::WithParamInterface<uint32_t> {};

TEST_P(TakeOverFuzzTest, EveryCutKeepsWhatEveryLayerHas) {
  std::mt19937 rng(GetParam());
  uint64_t num_kept = 0;              // rows, summed over layers
  std::vector<uint64_t> pipeline;     // stage ids
  std::map<uint64_t, uint32_t> rows;  // of the journal's sequences, after the last plan
  uint64_t next_stage = 1, next_sequence = 1, epoch = 1;
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE(testing::Message() << "seed " << GetParam() << " round " << round);
    // Another cut.
    std::vector<LayerIndex> cuts{0, kLayers};
    for (uint32_t n = rng() % 3; n > 0; --n) cuts.push_back(rng() % kLayers);
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    const auto num_stages = static_cast<uint32_t>(cuts.size() - 1);
    std::map<uint64_t, std::vector<uint32_t>> by_layer;  // rows of each sequence
    for (const uint64_t id : pipeline) {
      const Hosted& hosted = stages_.at(id);
      for (const auto& [sequence, length] : rows) {
        // Finished ones: every step that was begun is.
        const bool here = hosted.stage->cache().resident({sequence});
        for (LayerIndex l = hosted.layers().begin; l < hosted.layers().end; ++l) {
          by_layer.try_emplace(sequence, kLayers).first->second[l] =
              here ? hosted.stage->cache().length({sequence}) : 0;
        }
      }
    }
    std::vector<uint64_t> successors;
    std::vector<uint32_t> order;
    for (uint32_t i = 0; i < num_stages; ++i) {
      successors.push_back(next_stage++);
      Add(successors[i], {cuts[i], cuts[i + 1]});
      order.push_back(i);
    }
    std::shuffle(order.begin(), order.end(), rng);
    ++epoch;
    for (const uint32_t i : order) {
      Hosted& hosted = stages_.at(successors[i]);
      ASSERT_TRUE(hosted.stage->Activate({1, epoch}, i, num_stages).ok());
      std::vector<Stage*> before;
      for (const uint64_t id : pipeline) {
        const LayerRange layers = stages_.at(id).layers();
        if (layers.begin < cuts[i + 1] && cuts[i] < layers.end) {
          before.push_back(stages_.at(id).stage.get());
        }
      }
      hosted.stage->TakeOver(before);
      CheckIntegrity();
      Held due;
      for (const auto& [sequence, of] : by_layer) {
        const uint32_t least = *std::min_element(of.begin() + cuts[i], of.begin() + cuts[i + 1]);
        if (least > 0) due[sequence] = least;
      }
      ASSERT_EQ(hosted.Held(), due);
      for (const auto& [sequence, length] : due) {
        hosted.ExpectRows(sequence, length);
        num_kept += uint64_t{length} * hosted.layers().size();
      }
    }
    for (const uint64_t id : pipeline) stages_.erase(id);
    pipeline = successors;
    CheckIntegrity();
    // All of them go on with what all of them have.
    Held told;
    for (const uint64_t id : pipeline) {
      for (const auto& [sequence, length] : stages_.at(id).Held()) told.emplace(sequence, length);
    }
    for (auto& [sequence, length] : told) {
      for (const uint64_t id : pipeline) {
        const Held held = stages_.at(id).Held();
        const auto it = held.find(sequence);
        length = std::min(length, it == held.end() ? 0 : it->second);
      }
    }
    std::vector<v1::StepPlan> plans{Keep(stages_.at(pipeline[0]), told, num_stages)};
    rows.clear();
    for (const auto& [sequence, length] : told) {
      if (length > 0) rows[sequence] = length;
    }
    for (uint32_t n = 1 + rng() % 12; n > 0; --n) {
      v1::StepPlan plan = stages_.at(pipeline[0]).Plan(plans.size() + 1);
      const uint32_t what = rng() % 8;
      auto it = rows.empty() ? rows.end() : std::next(rows.begin(), rng() % rows.size());
      if (it != rows.end() && (what == 0 || it->second > 900)) {
        AddClose(&plan, it->first);
        rows.erase(it);
      } else {
        if (it == rows.end() || (what < 3 && rows.size() < 4)) {
          it = rows.emplace(next_sequence++, 0).first;
          AddOpen(&plan, it->first);
        }
        const uint32_t more = 1 + rng() % 100;
        AddRows(&plan, it->first, it->second, Tokens(it->first, it->second, more));
        it->second += more;
      }
      plans.push_back(std::move(plan));
    }
    // Each as far as the one before it at most; the first plan comes everywhere.
    size_t done = plans.size();
    for (const uint64_t id : pipeline) {
      Hosted& hosted = stages_.at(id);
      done = std::max<size_t>(1, done - std::min<size_t>(done, rng() % 3));
      for (size_t i = 0; i < plans.size() && i < done + 2; ++i) {
        hosted.Accept(plans[i]);
        if (i < done) {
          hosted.Begin();
          hosted.stage->FinishNext([] { return 0; });
        }
      }
      ASSERT_TRUE(hosted.stage->CheckIntegrity().ok()) << hosted.stage->CheckIntegrity();
    }
    // What the stages had of sequences that the journal closed goes with their first plan.
    for (const v1::StepPlan& plan : plans) {
      for (const v1::CacheOp& op : plan.cache_ops()) {
        if (op.has_close()) rows.emplace(op.close().sequence_id(), 0);
      }
    }
  }
  EXPECT_GT(num_kept, 20'000u);
}

INSTANTIATE_TEST_SUITE_P(Seeds, TakeOverFuzzTest, testing::Range(1u, 9u));

}  // namespace
}  // namespace strait
