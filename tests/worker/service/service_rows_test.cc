// SPDX-License-Identifier: Apache-2.0
//
// Defends: a worker fetches a running sequence's rows over its data port from who has them, and the sequence goes on
// there with the tokens that it would have had; only who shows the secret gets any.
#include "proto/model/content_key.h"
#include "tests/worker/service/service_fixture.h"

namespace strait {
namespace {

constexpr uint64_t kSequence = 9;
constexpr uint64_t kFromStage = 1;  // with all layers
constexpr uint64_t kToStage = 2;    // likewise
constexpr uint64_t kSecret = 77;

class ServiceRowsTest : public WorkerTest {
 protected:
  ServiceRowsTest() {
    coordinator_.Welcome();
    for (const uint64_t stage : {kFromStage, kToStage}) {
      Load(stage, 0, 6);
      ExpectState(stage, v1::StageState::LOADED);
      coordinator_.Send(Activation(stage, stage, 0, 1));
      ExpectState(stage, v1::StageState::ACTIVE);
    }
  }

  v1::StageReport RunPlan(const v1::ToWorker& plan) {
    coordinator_.Send(plan);
    const v1::FromWorker message = coordinator_.Answer();
    EXPECT_TRUE(message.has_report()) << message.ShortDebugString();
    EXPECT_EQ(message.report().error_code(), 0u) << message.report().error_message();
    return message.report();
  }
  template <class Message>
  static void SetMove(uint64_t stage, Message* message) {
    message->set_stage_id(stage);
    message->mutable_epoch()->set_term(1);
    message->mutable_epoch()->set_counter(stage);
    message->set_sequence_id(kSequence);
    message->mutable_placement()->set_term(1);
    message->mutable_placement()->set_counter(5);
  }
  void Serve(uint32_t served_rows) {
    v1::ToWorker message;
    SetMove(kFromStage, message.mutable_serve_rows());
    message.mutable_serve_rows()->set_secret(kSecret);
    message.mutable_serve_rows()->set_served_rows(served_rows);
    coordinator_.Send(message);
  }
  void Import(uint64_t step, uint32_t rows) {
    v1::ToWorker message;
    v1::StepPlan& plan = *message.mutable_step();
    plan.set_stage_id(kToStage);
    plan.mutable_epoch()->set_term(1);
    plan.mutable_epoch()->set_counter(kToStage);
    plan.set_step_id(step);
    v1::ImportSequence& import = *plan.add_cache_ops()->mutable_import();
    import.set_sequence_id(kSequence);
    import.mutable_placement()->set_term(1);
    import.mutable_placement()->set_counter(5);
    import.set_rows(rows);
    EXPECT_EQ(RunPlan(message).cache_bytes(), 6 * ((rows + 63) / 64) * shape_.block_bytes);
  }
  void Fetch(const std::vector<TokenId>& tokens, uint64_t secret) {
    v1::ToWorker message;
    v1::FetchRows& fetch = *message.mutable_fetch_rows();
    SetMove(kToStage, &fetch);
    fetch.set_end_row(static_cast<uint32_t>(tokens.size()));
    for (const TokenId token : tokens) fetch.mutable_tokens()->add_ids(token);
    v1::RowsSource* source = fetch.add_sources();
    source->set_layer_end(6);
    source->set_stage_id(kFromStage);
    source->mutable_epoch()->set_term(1);
    source->mutable_epoch()->set_counter(kFromStage);
    source->set_data_address(worker_->data_address());
    source->set_secret(secret);
    coordinator_.Send(message);
  }
};

TEST_F(ServiceRowsTest, ASequenceGoesOnWhereItsRowsWent) {
  std::vector<TokenId> prompt(150);
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<TokenId>(i * 5 % 1000);
  SequenceSpec spec;
  spec.prompt = prompt;
  spec.max_tokens = 2;
  spec.ignore_eos = true;
  spec.seed = 3;
  spec.temperature = 0;
  const sim::Expected expected = sim::Expect(spec, shape_);
  v1::StageReport report = RunPlan(Plan(kFromStage, kFromStage, 1, prompt, 0, true));
  EXPECT_EQ(report.results(0).sampled().token_id(), expected.tokens[0].id);

  Serve(0);
  Import(1, 150);
  Fetch(prompt, kSecret);
  v1::FromWorker message = coordinator_.Answer();
  while (message.has_rows_fetched() && message.rows_fetched().rows() < 150 &&
         message.rows_fetched().error_code() == 0) {
    message = coordinator_.Answer();
  }
  ASSERT_TRUE(message.has_rows_fetched()) << message.ShortDebugString();
  ASSERT_EQ(message.rows_fetched().rows(), 150u) << message.ShortDebugString();
  EXPECT_EQ(message.rows_fetched().fetched_bytes(), 150 * 6 * kHashRowBytes);
  const uint64_t digest = message.rows_fetched().digest();
  Serve(150);
  message = coordinator_.Answer();
  ASSERT_TRUE(message.has_rows_served()) << message.ShortDebugString();
  EXPECT_EQ(message.rows_served().rows(), 150u);
  EXPECT_EQ(message.rows_served().digest(), digest);

  v1::ToWorker plan = Plan(kToStage, kToStage, 2, {expected.tokens[0].id}, 150, true);
  v1::OpenSequence* open = plan.mutable_step()->mutable_cache_ops(0)->mutable_open();
  open->set_prompt_tokens(150);
  open->set_imported_rows(150);
  report = RunPlan(plan);
  ASSERT_EQ(report.results_size(), 1);
  EXPECT_EQ(report.results(0).sampled().token_id(), expected.tokens[1].id);
}

TEST_F(ServiceRowsTest, WithoutTheSecretThereAreNoRows) {
  const std::vector<TokenId> prompt(70, 4);
  RunPlan(Plan(kFromStage, kFromStage, 1, prompt, 0, true));
  Serve(0);
  Import(1, 70);
  Fetch(prompt, kSecret + 1);
  const v1::FromWorker message = coordinator_.Answer();
  ASSERT_TRUE(message.has_rows_fetched()) << message.ShortDebugString();
  EXPECT_EQ(static_cast<absl::StatusCode>(message.rows_fetched().error_code()),
            absl::StatusCode::kPermissionDenied)
      << message.ShortDebugString();
  EXPECT_EQ(message.rows_fetched().rows(), 0u);
}

// The worker is its own buddy: what a stage of it had, another one begins with.
TEST_F(ServiceRowsTest, AStageBeginsWithTheRowsOfOneThatIsGone) {
  std::vector<TokenId> prompt(150);
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<TokenId>(i * 7 % 1000);
  SequenceSpec spec;
  spec.prompt = prompt;
  spec.max_tokens = 2;
  spec.ignore_eos = true;
  spec.seed = 3;
  spec.temperature = 0;
  const sim::Expected expected = sim::Expect(spec, shape_);
  RunPlan(Plan(kFromStage, kFromStage, 1, prompt, 0, true));
  v1::ToWorker plan;
  plan.mutable_step()->set_stage_id(kFromStage);
  plan.mutable_step()->mutable_epoch()->set_term(1);
  plan.mutable_step()->mutable_epoch()->set_counter(kFromStage);
  plan.mutable_step()->set_step_id(2);
  v1::KeepPrefix* keep = plan.mutable_step()->add_cache_ops()->mutable_keep_prefix();
  const std::string keys = Pack({ContentKey{1, 1}, ContentKey{2, 2}});
  keep->set_sequence_id(kSequence);
  keep->set_keys(keys);
  RunPlan(plan);

  v1::ToWorker message;
  v1::ServeRows* serve = message.mutable_serve_rows();
  serve->set_stage_id(kFromStage);
  serve->mutable_epoch()->set_term(1);
  serve->mutable_epoch()->set_counter(kFromStage);
  serve->set_secret(kSecret);
  coordinator_.Send(message);
  v1::RowsSource source;
  source.set_layer_end(6);
  source.set_stage_id(kFromStage);
  *source.mutable_epoch() = serve->epoch();
  source.set_data_address(worker_->data_address());
  source.set_secret(kSecret);
  *message.mutable_replicate()->mutable_source() = source;
  message.mutable_replicate()->set_keys(keys);
  coordinator_.Send(message);
  v1::FromWorker answer = coordinator_.Answer();
  ASSERT_TRUE(answer.has_replicated()) << answer.ShortDebugString();
  EXPECT_EQ(answer.replicated().keys(), keys);
  EXPECT_EQ(answer.replicated().fetched_bytes(), 2 * 6 * 64 * kHashRowBytes);
  message.mutable_unload_stage()->set_stage_id(kFromStage);
  coordinator_.Send(message);
  ExpectState(kFromStage, v1::StageState::UNLOADED);

  message = {};
  message.mutable_serve_rows()->set_secret(kSecret + 1);
  coordinator_.Send(message);
  message = Activation(kToStage, kToStage + 1, 0, 1);
  v1::ActivateStage& activate = *message.mutable_activate_stage();
  activate.set_restore_timeout_ms(60'000);
  v1::FetchRows& fetch = *activate.add_restores();
  SetMove(kToStage, &fetch);
  *fetch.mutable_epoch() = activate.epoch();
  fetch.set_end_row(128);
  fetch.mutable_tokens()->mutable_ids()->Add(prompt.begin(), prompt.begin() + 128);
  fetch.set_keys(keys);
  source.set_stage_id(0);
  source.clear_epoch();
  source.set_secret(kSecret + 1);
  *fetch.add_sources() = source;
  coordinator_.Send(message);
  answer = coordinator_.Answer();
  ASSERT_TRUE(answer.has_stage_state()) << answer.ShortDebugString();
  ASSERT_EQ(answer.stage_state().held_size(), 1) << answer.ShortDebugString();
  EXPECT_EQ(answer.stage_state().held(0).rows(), 128u);
  EXPECT_EQ(answer.stage_state().held(0).prefix_blocks(), 2u);

  const std::vector<TokenId> rest(prompt.begin() + 128, prompt.end());
  plan = Plan(kToStage, kToStage + 1, 1, rest, 128, true);
  v1::OpenSequence* open = plan.mutable_step()->mutable_cache_ops(0)->mutable_open();
  open->set_prompt_tokens(150);
  open->add_kept_rows(128);
  const v1::StageReport report = RunPlan(plan);
  ASSERT_EQ(report.results_size(), 1);
  EXPECT_EQ(report.results(0).sampled().token_id(), expected.tokens[0].id);
  EXPECT_EQ(report.rows_computed(), 22u);
}

}  // namespace
}  // namespace strait
