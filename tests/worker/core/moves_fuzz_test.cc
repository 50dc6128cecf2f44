// SPDX-License-Identifier: Apache-2.0
//
// Defends: a sequence that moves to a pipeline of other layer ranges while it grows arrives with exactly its rows, and
// both ends say so by equal digests, whatever the network loses, damages, doubles and delays; a move that ends
// before leaves nothing behind at either end.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "tests/worker/core/moves_fixture.h"

namespace strait {
namespace {

std::vector<LayerRange> AnySplit(std::mt19937* rng) {
  std::vector<LayerRange> split;
  for (LayerIndex at = 0; at < ManyStages::kLayers;) {
    const LayerIndex end = std::min<LayerIndex>(ManyStages::kLayers, at + 1 + (*rng)() % 4);
    split.push_back({at, end});
    at = end;
  }
  return split;
}

class Mover {
 public:
  Mover(uint32_t seed, std::mt19937 rng) : p_(seed, AnySplit(&rng), AnySplit(&rng)) {
    p_.network.faults = {.lost = p_.Below(15),
                         .damaged = p_.Below(seed % 4 == 0 ? 30 : 6),
                         .foreign = p_.Below(seed % 4 == 0 ? 30 : 6),
                         .twice = p_.Below(30),
                         .silent = p_.Below(10)};
  }

  // A whole life of one move. What ends it early: nothing, or one of what may.
  void Move(uint64_t id) {
    const PlacementEpoch placement = {1, ++last_placement_};
    std::vector<TokenId> tokens;
    p_.Grow(&p_.from, id, &tokens, 1 + p_.Below(300));
    if (other_.empty() || p_.Below(3) == 0) Background();
    ASSERT_TRUE(p_.TurnUntil([&] { return p_.AllReported(p_.from); }));
    p_.Serve(id, placement);
    auto taken = static_cast<uint32_t>(tokens.size());
    p_.Import(id, placement, taken);
    uint32_t fetched = 0;
    for (uint32_t round = p_.Below(4); round > 0; --round) {
      const auto end = static_cast<uint32_t>(tokens.size());
      if (end > taken) p_.Import(id, placement, taken = end + p_.Below(100));
      if (end > fetched) p_.Fetch(id, placement, tokens, fetched, end, false, Rate());
      fetched = end;
      // It grows meanwhile.
      for (uint32_t i = p_.Below(4); i > 0; --i) {
        p_.Grow(&p_.from, id, &tokens, 1 + p_.Below(40));
        Stir();
      }
      ASSERT_TRUE(p_.TurnUntil([&] {
        return p_.AllReported(p_.from) && (p_.Below(5) == 0 || p_.Fetched(placement, fetched));
      }));
      if (p_.told[placement].num_errors > 0) return Abandon(id, placement);
      if (p_.Below(8) == 0) return EndEarly(id, placement);
    }
    const auto rows = static_cast<uint32_t>(tokens.size());
    if (rows > taken) p_.Import(id, placement, rows);
    if (rows > fetched) p_.Fetch(id, placement, tokens, fetched, rows, true);
    p_.Serve(id, placement, rows);
    ASSERT_TRUE(p_.TurnUntil([&] {
      return p_.told[placement].num_errors > 0 ||
             (p_.Fetched(placement, rows) &&
              (p_.network.faults.silent > 0 || p_.Served(placement)));
    }));
    if (p_.told[placement].num_errors > 0) return Abandon(id, placement);
    if (p_.Served(placement)) {
      ASSERT_EQ(p_.DigestFetched(placement), p_.DigestServed(placement));
      ++num_agreed;
    }
    v1::StepPlan plan = p_.to.Plan();
    AddOpen(&plan, id);
    plan.mutable_cache_ops(plan.cache_ops_size() - 1)->mutable_open()->set_imported_rows(rows);
    p_.AddMore(&plan, id, &tokens, 1 + p_.Below(80));
    p_.to.Send(plan);
    ASSERT_TRUE(p_.TurnUntil([&] { return p_.AllReported(p_.to); }));
    p_.to.ExpectRows(id, tokens);
    const uint64_t hash = FakeHash(p_.to.layers.back(), tokens);
    const v1::StageReport& last = p_.to.report_of.at(p_.to.stages.back());
    ASSERT_EQ(last.results_size(), 1);
    EXPECT_EQ(last.results(0).scored(0).logprob(), -static_cast<float>(hash % 4096));
    Close(&p_.from, id);
    Close(&p_.to, id);
    ++num_moved;
  }

  void End() {
    p_.ExpectNothingUnderWay();
    p_.from.worker.core.DropStages();
    p_.to.worker.core.DropStages();
    p_.Read();
    EXPECT_EQ(p_.from.worker.taken, 0);
    EXPECT_EQ(p_.to.worker.taken, 0);
  }

  int num_moved = 0;
  int num_agreed = 0;
  int num_ended = 0;
  int num_abandoned = 0;
  const FaultyNetwork& network() const { return p_.network; }

 private:
  uint64_t Rate() { return p_.Below(3) == 0 ? 100'000 + p_.Below(1'000'000) : 0; }

  // Another sequence steps at the destination.
  void Background() { p_.Grow(&p_.to, 1'000, &other_, 1 + p_.Below(20)); }

  // What else may happen while rows move.
  void Stir() {
    for (Pipeline* pipeline : {&p_.from, &p_.to}) {
      for (const auto& [id, model] : pipeline->worker.models) {
        model->copy_faults.delay_polls = p_.Below(4);
      }
    }
    if (p_.Below(3) == 0 && other_.size() < 500) Background();
    if (p_.Below(4) == 0) {
      // As much as it had: the cache is made smaller and larger on the way.
      Pipeline& pipeline = p_.Below(2) == 0 ? p_.from : p_.to;
      const size_t i = p_.Below(static_cast<uint32_t>(pipeline.stages.size()));
      const uint32_t blocks = (36 + p_.Below(8)) * pipeline.layers[i].size();
      pipeline.worker.ResizeBlocks(pipeline.stages[i], blocks);
    }
  }

  // And others take its blocks at once.
  void Close(Pipeline* pipeline, uint64_t id) {
    v1::StepPlan plan = WithClose(pipeline->Plan(), id);
    std::vector<TokenId> tokens;
    AddOpen(&plan, 2'000 + id);
    p_.AddMore(&plan, 2'000 + id, &tokens, 1 + p_.Below(300));
    pipeline->Send(plan);
    pipeline->Send(WithClose(pipeline->Plan(), 2'000 + id));
  }

  // The coordinator gives the move up, in one of its ways.
  void EndEarly(uint64_t id, PlacementEpoch placement) {
    ++num_ended;
    switch (p_.Below(4)) {
      case 0:
        Close(&p_.to, id);
        p_.Serve(id, placement, 0, true);
        return Close(&p_.from, id);
      case 1:  // the sequence ends
        Close(&p_.from, id);
        return Close(&p_.to, id);
      case 2: {  // an epoch ends, when what others' plans opened is closed: the next plan names all that is left
        ASSERT_TRUE(p_.TurnUntil([&] { return p_.AllReported(p_.to); }));
        p_.to.Activate();
        v1::StepPlan plan = p_.to.Plan();
        if (!other_.empty()) AddClose(&plan, 1'000);
        other_.clear();
        p_.to.Send(plan);
        return Close(&p_.from, id);
      }
      default:
        p_.from.Activate();
        Close(&p_.from, id);
        return Close(&p_.to, id);
    }
  }

  // Rows came damaged too often, or of something else.
  void Abandon(uint64_t id, PlacementEpoch placement) {
    ++num_abandoned;
    for (const auto& [stage, rows] : p_.told[placement].fetched) {
      const auto code = static_cast<absl::StatusCode>(rows.error_code());
      EXPECT_TRUE(rows.error_code() == 0 || code == absl::StatusCode::kDataLoss ||
                  code == absl::StatusCode::kFailedPrecondition)
          << rows.error_message();
    }
    Close(&p_.to, id);
    Close(&p_.from, id);
  }

  TwoPipelines p_;
  std::vector<TokenId> other_;  // of the sequence that steps at the destination
  uint64_t last_placement_ = 0;
};

TEST(MovesFuzzTest, WhatArrivesIsWhatLeft) {
  int num_moved = 0;
  int num_agreed = 0;
  int num_ended = 0;
  int num_abandoned = 0;
  int num_faults = 0;
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Mover mover(seed, std::mt19937(seed));
    for (uint64_t id = 1; id <= 12; ++id) {
      mover.Move(id);
      ASSERT_FALSE(HasFailure());
    }
    mover.End();
    ASSERT_FALSE(HasFailure());
    num_moved += mover.num_moved;
    num_agreed += mover.num_agreed;
    num_ended += mover.num_ended;
    num_abandoned += mover.num_abandoned;
    num_faults += mover.network().num_faults;
  }
  std::printf("moved %d, digests agreed %d, ended early %d, abandoned %d, faults %d\n", num_moved,
              num_agreed, num_ended, num_abandoned, num_faults);
  EXPECT_GT(num_moved, 400);
  EXPECT_GT(num_agreed, 300);
  EXPECT_GT(num_ended, 10);
  EXPECT_GT(num_abandoned, 5);
  EXPECT_GT(num_faults, 1'000);
}

}  // namespace
}  // namespace strait
