// SPDX-License-Identifier: Apache-2.0
//
// ScalingTest is a cluster of small workers whose pipelines get other stages.
#pragma once

#include <memory>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/harness.h"

namespace strait {

// One layer has 1,000 bytes, embedding and head 500, a workspace 50, a block of all layers 512.
inline constexpr uint64_t kFixed = 5050;

inline CoreOptions Options(uint32_t num_stages, uint32_t num_pipelines = 1) {
  CoreOptions options;
  options.num_stages = num_stages;
  options.num_pipelines = num_pipelines;
  return options;
}

class ScalingTest : public testing::Test {
 protected:
  void Start(CoreOptions options, std::vector<uint64_t> memory) {
    h_ = std::make_unique<Harness>(options, SmallModel());
    h_->token_at = [](uint64_t sequence, uint32_t position) {
      return static_cast<uint32_t>(10 + (sequence * 31 + position * 7) % 83);
    };
    for (const uint64_t bytes : memory) workers_.push_back(h_->Attach(bytes));
    ASSERT_TRUE(h_->core.Ready());
  }
  void TearDown() override {
    ASSERT_NE(h_, nullptr);
    EXPECT_THAT(h_->problems, testing::IsEmpty());
  }
  // Two sequences some tokens along.
  void Serve() {
    for (const uint32_t prompt : {100u, 30u}) {
      requests_.push_back(h_->Submit(OneSequence(prompt, 60)));
    }
    Rounds(5);
  }
  void Rounds(int rounds) { h_->Rounds(rounds); }
  // The new stages of the first worker are active only so long after the old ones' last step.
  ScaleId ScaleToTwo(uint64_t still_us) {
    h_->answer_activations = false;
    const ScaleId id = h_->Scale(2);
    Rounds(3);  // until nothing is under way
    h_->Tick(still_us);
    for (auto& [stage_id, stage] : h_->workers.at(workers_[0]).stages) {
      if (!stage.load.successor_of().empty()) h_->AnswerActivation(workers_[0], stage);
    }
    h_->answer_activations = true;
    h_->Pump();
    return id;
  }
  // All of it, each once and in order.
  void ExpectAllTokens() {
    h_->Run();
    for (const RequestId id : requests_) {
      ASSERT_TRUE(h_->ended.contains(id)) << h_->core.StatusJson(h_->now_us);
      EXPECT_EQ(h_->ended.at(id).reason, FinishReason::kLength) << h_->ended.at(id).status;
      const std::vector<TokenInfo>& tokens = h_->tokens[id];
      ASSERT_EQ(tokens.size(), 60u);
      for (size_t i = 1; i < tokens.size(); ++i) {
        EXPECT_EQ(tokens[i].position, tokens[i - 1].position + 1);
      }
    }
  }
  size_t NumStages(WorkerId id) const { return h_->workers.at(id).stages.size(); }
  absl::Status StatusOf(ScaleId id) const {
    return h_->scaled.contains(id) ? h_->scaled.at(id).status : absl::UnknownError("no answer");
  }
  std::vector<LayerRange> Layers(WorkerId id) const {
    std::vector<LayerRange> layers;
    for (const auto& [stage_id, stage] : h_->workers.at(id).stages) {
      layers.push_back(stage.layers());
    }
    return layers;
  }
  uint64_t CacheBytes(WorkerId id) const {
    uint64_t bytes = 0;
    for (const auto& [stage_id, stage] : h_->workers.at(id).stages) bytes += stage.cache_bytes;
    return bytes;
  }

  std::unique_ptr<Harness> h_;
  std::vector<WorkerId> workers_;
  std::vector<RequestId> requests_;
};

}  // namespace strait
