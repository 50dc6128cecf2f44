// SPDX-License-Identifier: Apache-2.0
//
// TestPipeline: real Stages over a backend, in one thread, hidden states handed on directly.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "tests/worker/stage/plans.h"
#include "worker/model/cpu_backend.h"
#include "worker/stage/stage.h"

namespace strait {

class TestPipeline {
 public:
  // `ends`: the layer after each stage's last one, rising to num_hidden_layers.
  TestPipeline(const CpuBackendOptions& options, std::unique_ptr<WeightSource> source,
               const std::vector<LayerIndex>& ends, uint32_t sequence_tokens = 2048)
      : TestPipeline(MakeCpu(options, std::move(source)), ends, sequence_tokens) {}

  TestPipeline(std::unique_ptr<Backend> backend, const std::vector<LayerIndex>& ends,
               uint32_t sequence_tokens = 2048)
      : backend_(std::move(backend)) {
    LayerIndex begin = 0;
    for (const LayerIndex end : ends) {
      StageSpec spec;
      spec.layers = {begin, end};
      spec.pool_blocks = static_cast<uint32_t>(BlocksOfSequence(sequence_tokens, end - begin));
      auto model = backend_->Load(spec, {});
      EXPECT_TRUE(model.ok()) << model.status();
      auto stage =
          std::make_unique<Stage>(stages_.size(), *std::move(model), StageTraitsOf(*backend_));
      EXPECT_TRUE(stage
                      ->Activate({1, 1}, static_cast<uint32_t>(stages_.size()),
                                 static_cast<uint32_t>(ends.size()))
                      .ok());
      stages_.push_back(std::move(stage));
      begin = end;
    }
  }

  v1::StepPlan Plan() {
    v1::StepPlan plan;
    plan.mutable_epoch()->set_term(1);
    plan.mutable_epoch()->set_counter(1);
    plan.set_step_id(next_step_++);
    return plan;
  }

  // The last stage's results.
  std::vector<v1::SequenceResult> Run(v1::StepPlan plan) {
    std::optional<HiddenStep> hidden;
    StepOutput out;
    for (const auto& stage : stages_) {
      plan.set_stage_id(stage->stage_id());
      const absl::Status accepted = stage->AcceptPlan(plan, 0);
      EXPECT_TRUE(accepted.ok()) << accepted;
      if (hidden) {
        EXPECT_TRUE(stage->AcceptHidden(*std::move(hidden), 0).ok());
      }
      stage->BeginNext([] { return uint64_t{0}; }, memory);
      out = stage->FinishNext([] { return uint64_t{0}; });
      EXPECT_EQ(out.report.error_code(), 0u) << out.report.error_message();
      EXPECT_TRUE(stage->CheckIntegrity().ok()) << stage->CheckIntegrity();
      hidden = std::move(out.hidden);
    }
    return {out.report.results().begin(), out.report.results().end()};
  }

  Backend& backend() { return *backend_; }

  HiddenMemory memory;  // of hidden states between the stages; empty: host memory

 private:
  static std::unique_ptr<Backend> MakeCpu(const CpuBackendOptions& options,
                                          std::unique_ptr<WeightSource> source) {
    auto backend = CpuBackend::Create(options, std::move(source));
    EXPECT_TRUE(backend.ok()) << backend.status();
    return *std::move(backend);
  }

  std::unique_ptr<Backend> backend_;
  std::vector<std::unique_ptr<Stage>> stages_;
  uint64_t next_step_ = 1;
};

}  // namespace strait
