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
      stages_.push_back(Load(stages_.size(), spec));
      begin = end;
    }
    for (size_t i = 0; i < stages_.size(); ++i) Activate(i);
  }

  // The next epoch, at step 1. A stage that is replaced has no rows; the others keep theirs.
  void NewEpoch(size_t replaced) {
    const StageSpec spec = stages_[replaced]->model().spec();
    const uint64_t id = stages_[replaced]->stage_id();
    stages_[replaced].reset();
    stages_[replaced] = Load(id, spec);
    ++epoch_.counter;
    next_step_ = 1;
    for (size_t i = 0; i < stages_.size(); ++i) Activate(i);
  }
  size_t num_stages() const { return stages_.size(); }
  // Of the last step: rows that went through each stage, and those of them that were stored.
  std::vector<uint32_t> rows_computed, rows_stored;

  v1::StepPlan Plan() {
    v1::StepPlan plan;
    plan.mutable_epoch()->set_term(epoch_.term);
    plan.mutable_epoch()->set_counter(epoch_.counter);
    plan.set_step_id(next_step_++);
    return plan;
  }

  // The last stage's results.
  std::vector<v1::SequenceResult> Run(v1::StepPlan plan) {
    std::optional<HiddenStep> hidden;
    StepOutput out;
    rows_computed.clear();
    rows_stored.clear();
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
      rows_computed.push_back(out.report.rows_computed());
      rows_stored.push_back(out.report.rows_stored());
    }
    return {out.report.results().begin(), out.report.results().end()};
  }

  Backend& backend() { return *backend_; }

  HiddenMemory memory;  // of hidden states between the stages; empty: host memory

 private:
  std::unique_ptr<Stage> Load(uint64_t id, const StageSpec& spec) {
    const uint32_t free = pool_.size() - pool_.used();
    if (free < spec.pool_blocks) {
      EXPECT_TRUE(backend_->cache().Resize(pool_.size() + spec.pool_blocks - free, {}).ok());
      pool_.Grow(pool_.size() + spec.pool_blocks - free);
    }
    auto model = backend_->Load(spec, {});
    EXPECT_TRUE(model.ok()) << model.status();
    return std::make_unique<Stage>(id, *std::move(model), StageTraitsOf(*backend_), &pool_);
  }
  void Activate(size_t index) {
    const absl::Status status = stages_[index]->Activate(epoch_, static_cast<uint32_t>(index),
                                                         static_cast<uint32_t>(stages_.size()));
    EXPECT_TRUE(status.ok()) << status;
  }

  static std::unique_ptr<Backend> MakeCpu(const CpuBackendOptions& options,
                                          std::unique_ptr<WeightSource> source) {
    auto backend = CpuBackend::Create(options, std::move(source));
    EXPECT_TRUE(backend.ok()) << backend.status();
    return *std::move(backend);
  }

  std::unique_ptr<Backend> backend_;
  BlockPool pool_;
  std::vector<std::unique_ptr<Stage>> stages_;
  PipelineEpoch epoch_{1, 1};
  uint64_t next_step_ = 1;
};

}  // namespace strait
