// SPDX-License-Identifier: Apache-2.0
//
// Defends: steps that are enqueued while the one before them is under way give the bits of steps one
// at a time: where ids go from one to the next on the device, in graphs and outside, behind a step of
// several tiles, where a step writes blocks that the one before it read, and where hidden states come
// and go through the host.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/worker/model/cuda/cuda_fixture.h"
#include "tests/worker/model/load_with_cache.h"
#include "tests/worker/stage/plans.h"
#include "worker/stage/stage.h"

namespace strait {
namespace {

constexpr PipelineEpoch kEpoch{1, 1};

class CudaAheadTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    CudaBackendOptions options;
    options.memory_bytes = uint64_t{1} << 30;
    backend_ = MakeCuda(Model(), options, 5);
  }

  static ModelConfig Model() { return OnCuda(TinyV3()); }

  // Of one epoch. What is in the cache before must not matter.
  std::unique_ptr<Stage> Load(LayerRange layers, uint32_t index, uint32_t num_stages) {
    StageSpec spec;
    spec.layers = layers;
    spec.pool_blocks = 5 * layers.size();  // few: a block is soon another sequence's
    auto model = LoadWithCache(backend_.get(), spec);
    EXPECT_TRUE(model.ok()) << model.status();
    pool_.Grow(backend_->cache().num_blocks());
    auto stage = std::make_unique<Stage>(1, *std::move(model), StageTraitsOf(*backend_), &pool_);
    EXPECT_TRUE(stage->Activate(kEpoch, index, num_stages).ok());
    return stage;
  }

  static v1::StepPlan Plan(uint64_t step) {
    v1::StepPlan plan;
    plan.set_stage_id(1);
    plan.mutable_epoch()->set_term(1);
    plan.mutable_epoch()->set_counter(1);
    plan.set_step_id(step);
    return plan;
  }

  static std::vector<TokenId> Tokens(uint32_t count, uint32_t salt) {
    std::vector<TokenId> tokens;
    for (uint32_t i = 0; i < count; ++i) tokens.push_back((i * 7 + salt) % Model().vocab_size);
    return tokens;
  }

  // All steps' outputs; `ahead`: each step is begun before the one before it is finished, if it may.
  std::vector<StepOutput> Run(Stage* stage, bool ahead, size_t num_steps) {
    num_ahead_ = 0;
    std::vector<StepOutput> all;
    while (all.size() < num_steps) {
      while (stage->Ready() && (ahead || stage->num_begun() == 0)) {
        num_ahead_ += stage->num_begun() > 0;
        stage->BeginNext([] { return uint64_t{0}; });
      }
      while (!stage->Done()) {
      }
      all.push_back(stage->FinishNext([] { return uint64_t{0}; }));
      EXPECT_EQ(all.back().report.error_code(), 0u) << all.back().report.error_message();
    }
    return all;
  }

  std::unique_ptr<CudaBackend> backend_;
  BlockPool pool_;
  int num_ahead_ = 0;
};

// Plans in which each sequence feeds what it samples.
class Grants {
 public:
  void Open(v1::StepPlan* plan, uint64_t id, const std::vector<TokenId>& prompt, bool penalty) {
    AddOpen(plan, id, static_cast<uint32_t>(prompt.size()));
    v1::SamplingParams* sampling =
        plan->mutable_cache_ops(plan->cache_ops_size() - 1)->mutable_open()->mutable_sampling();
    sampling->set_seed(id);
    sampling->set_temperature(id % 2 == 0 ? 0.0f : 0.9f);
    if (penalty) sampling->set_frequency_penalty(0.3f);
    const auto length = static_cast<uint32_t>(prompt.size());
    WantSample(AddRows(plan, id, 0, prompt), length - 1, 3);
    sequences_.push_back({id, length, plan->step_id()});
  }
  void Close(v1::StepPlan* plan, uint64_t id) {
    AddClose(plan, id);
    std::erase_if(sequences_, [&](const Sequence& s) { return s.id == id; });
  }
  void DecodeAll(v1::StepPlan* plan) {
    for (Sequence& s : sequences_) {
      if (s.sampled_by == plan->step_id()) continue;
      WantSample(AddGrant(plan, s.id, s.length++, s.sampled_by), 0, 3);
      s.sampled_by = plan->step_id();
    }
  }

 private:
  struct Sequence {
    uint64_t id;
    uint32_t length;
    uint64_t sampled_by;
  };
  std::vector<Sequence> sequences_;
};

TEST_F(CudaAheadTest, SameBitsWhereIdsStayOnTheDevice) {
  std::vector<v1::StepPlan> plans;
  Grants grants;
  for (uint64_t step = 1; step <= 14; ++step) {
    v1::StepPlan plan = Plan(step);
    if (step == 1) {  // two tiles, and an id of the first is fed by step 2
      grants.Open(&plan, 1, Tokens(5, 1), false);
      grants.Open(&plan, 2, Tokens(62, 2), false);
      grants.Open(&plan, 3, Tokens(3, 3), false);
    }
    if (step == 9) grants.Close(&plan, 2);  // its blocks are the next one's
    if (step == 6 || step == 9) grants.Open(&plan, step, Tokens(30, 4), false);
    if (step == 12) grants.Close(&plan, 3);
    if (step == 12) grants.Open(&plan, 12, Tokens(4, 5), true);
    grants.DecodeAll(&plan);
    plans.push_back(plan);
  }
  std::vector<StepOutput> outputs[2];
  for (const bool ahead : {false, true}) {
    const std::unique_ptr<Stage> stage = Load({0, Model().num_hidden_layers}, 0, 1);
    ASSERT_FALSE(stage->model().TakesAhead(70, 3)) << "step 1 is of several tiles";
    for (const v1::StepPlan& plan : plans) {
      const absl::Status accepted = stage->AcceptPlan(plan, 0);
      ASSERT_TRUE(accepted.ok()) << accepted;
    }
    outputs[ahead] = Run(stage.get(), ahead, plans.size());
    // All but the last two, whose penalties take the id.
    EXPECT_EQ(num_ahead_, ahead ? 11 : 0);
  }
  for (size_t i = 0; i < plans.size(); ++i) {
    EXPECT_EQ(outputs[true][i].report.ShortDebugString(),
              outputs[false][i].report.ShortDebugString())
        << "step " << i + 1;
  }
}

TEST_F(CudaAheadTest, SameBitsThroughTheHost) {
  const LayerIndex n = Model().num_hidden_layers;
  std::vector<v1::StepPlan> plans;
  for (uint32_t step = 1; step <= 5; ++step) {
    v1::StepPlan plan = Plan(step);
    for (uint64_t id = 1; id <= 2; ++id) {
      if (step == 1) AddOpen(&plan, id);
      const uint32_t count = step == 1 ? 20 : 1;
      const uint32_t first = step == 1 ? 0 : 18 + step;
      WantSample(AddRows(&plan, id, first, Tokens(count, step + static_cast<uint32_t>(id))),
                 count - 1, 3);
    }
    plans.push_back(plan);
  }
  std::vector<StepOutput> outputs[2];
  for (const bool ahead : {false, true}) {
    const std::unique_ptr<Stage> first = Load({0, 1}, 0, 2);
    const std::unique_ptr<Stage> last = Load({1, n}, 1, 2);
    for (const v1::StepPlan& plan : plans) {
      ASSERT_TRUE(first->AcceptPlan(plan, 0).ok());
      ASSERT_TRUE(last->AcceptPlan(plan, 0).ok());
    }
    for (StepOutput& output : Run(first.get(), ahead, plans.size())) {
      ASSERT_TRUE(last->AcceptHidden(*std::move(output.hidden), 0).ok());
    }
    EXPECT_EQ(num_ahead_, ahead ? 4 : 0);
    outputs[ahead] = Run(last.get(), ahead, plans.size());
    EXPECT_EQ(num_ahead_, ahead ? 4 : 0);
  }
  for (size_t i = 0; i < plans.size(); ++i) {
    EXPECT_EQ(outputs[true][i].report.ShortDebugString(),
              outputs[false][i].report.ShortDebugString())
        << "step " << i + 1;
  }
}

}  // namespace
}  // namespace strait
