// SPDX-License-Identifier: Apache-2.0
//
// ReplicasTest is a coordinator's core whose workers keep copies of each other's blocks.
//
// Thread:  one, as its tests.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tests/coordinator/core/harness.h"

namespace strait {

// One layer has 1,000 bytes, embedding and head 500, a workspace 50, a block of all layers 512.
inline constexpr uint64_t kRoomy = 100'000;

class ReplicasTest : public testing::Test {
 protected:
  // `replica_bytes` of each worker; 0: it is no buddy.
  void Start(CoreOptions options, const std::vector<uint64_t>& replica_bytes) {
    h_ = std::make_unique<Harness>(options, SmallModel());
    h_->token_at = [](uint64_t sequence, uint32_t position) {
      return static_cast<uint32_t>(10 + (sequence * 31 + position * 7) % 83);
    };
    for (const uint64_t bytes : replica_bytes) w_.push_back(Attach(bytes));
    ASSERT_EQ(h_->core.Stats().pipelines_active, options.num_pipelines);
  }
  static CoreOptions Options(uint32_t num_stages, uint32_t num_pipelines = 1) {
    CoreOptions options;
    options.num_stages = num_stages;
    options.num_pipelines = num_pipelines;
    options.max_step_tokens = 256;
    options.prefill_chunk = 256;
    options.prefix_cache = true;
    return options;
  }
  WorkerId Attach(uint64_t replica_bytes) {
    v1::Hello hello = h_->MakeHello(kRoomy);
    hello.set_replica_bytes(replica_bytes);
    return h_->Attach(hello);
  }
  void TearDown() override {
    ASSERT_NE(h_, nullptr);
    EXPECT_THAT(h_->problems, testing::IsEmpty());
  }
  void Rounds(int rounds) { h_->Rounds(rounds); }
  // Until it has so many tokens.
  void Until(RequestId request, size_t tokens) {
    for (int i = 0; i < 500 && h_->tokens[request].size() < tokens; ++i) Rounds(1);
    ASSERT_GE(h_->tokens[request].size(), tokens);
  }
  WorkerId HostOf(uint64_t layer_begin, uint64_t pipeline = 0) {
    for (const auto& [id, worker] : h_->workers) {
      for (const auto& [stage_id, stage] : worker.stages) {
        if (stage.load.layer_begin() != layer_begin || worker.evicted) continue;
        if (pipeline == 0 || stage.activate.pipeline_id() == pipeline) return id;
      }
    }
    return {};
  }
  WorkerId HostOfSequence(uint64_t sequence) {
    for (const auto& [id, worker] : h_->workers) {
      for (const auto& [stage_id, stage] : worker.stages) {
        if (stage.lengths.contains(SequenceId{sequence})) return id;
      }
    }
    return {};
  }
  // Of the sequence that `status` lists first.
  uint32_t ProtectedRows() {
    const std::string status = h_->core.StatusJson(h_->now_us);
    const std::string name = "\"protected_rows\":";
    const size_t at = status.find(name);
    return at == std::string::npos ? 0 : std::stoul(status.substr(at + name.size()));
  }
  bool IsUnprotected() {
    return h_->core.StatusJson(h_->now_us).find("\"unprotected\":true") != std::string::npos;
  }
  void ExpectWhole(RequestId request, uint64_t sequence, uint32_t prompt, uint32_t max_tokens) {
    ASSERT_TRUE(h_->ended.contains(request)) << h_->core.StatusJson(h_->now_us);
    EXPECT_TRUE(h_->ended.at(request).status.ok()) << h_->ended.at(request).status;
    const std::vector<TokenInfo>& tokens = h_->tokens[request];
    ASSERT_EQ(tokens.size(), max_tokens);
    for (uint32_t i = 0; i < max_tokens; ++i) {
      EXPECT_EQ(tokens[i].position, prompt + i);
      EXPECT_EQ(tokens[i].id, h_->token_at(sequence, prompt + i));
    }
  }

  std::unique_ptr<Harness> h_;
  std::vector<WorkerId> w_;
};

}  // namespace strait
