// SPDX-License-Identifier: Apache-2.0
//
// Defends: over real sockets and threads a client gets exactly the tokens that the oracle says, on
// any number of stages, however requests come together, and through the death of workers and of
// streams.
#include <random>

#include "gtest/gtest.h"
#include "tests/coordinator/service/cluster_fixture.h"

namespace strait {
namespace {

class Stages : public testing::TestWithParam<uint32_t> {};

TEST_P(Stages, TokensAreTheOraclesAlone) {
  ClusterFixture cluster(GetParam());
  ASSERT_TRUE(cluster.WaitReady());
  for (uint32_t prompt : {1, 63, 64, 65, 700}) {
    RequestSpec spec = MakeRequest(prompt, 20, prompt);
    spec.sequences[0].score_prompt = true;
    auto got = cluster.Submit(spec);
    ASSERT_TRUE(got->WaitEnd());
    cluster.ExpectAsOracleSays(spec, *got);
  }
}

TEST_P(Stages, TokensAreTheOraclesTogether) {
  ClusterFixture cluster(GetParam());
  ASSERT_TRUE(cluster.WaitReady());
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  std::vector<std::pair<RequestSpec, std::shared_ptr<Recorder>>> running;
  for (int i = 0; i < 40; ++i) {
    RequestSpec spec =
        MakeRequest(1 + random() % 600, 1 + random() % 60, random(), 1 + random() % 3);
    auto recorder = cluster.Submit(spec);
    running.emplace_back(std::move(spec), std::move(recorder));
  }
  for (auto& [spec, got] : running) {
    ASSERT_TRUE(got->WaitEnd());
    cluster.ExpectAsOracleSays(spec, *got);
  }
}

INSTANTIATE_TEST_SUITE_P(Cluster, Stages, testing::Values(1, 2, 3));

TEST(Cluster, TwoPipelinesServe) {
  ClusterFixture cluster(2, 2);
  ASSERT_TRUE(cluster.WaitReady());
  std::vector<std::pair<RequestSpec, std::shared_ptr<Recorder>>> running;
  for (uint64_t i = 0; i < 20; ++i) {
    RequestSpec spec = MakeRequest(50, 30, i);
    auto recorder = cluster.Submit(spec);
    running.emplace_back(std::move(spec), std::move(recorder));
  }
  for (auto& [spec, got] : running) {
    ASSERT_TRUE(got->WaitEnd());
    cluster.ExpectAsOracleSays(spec, *got);
  }
}

TEST(Cluster, WorkersDeathIsAPause) {
  ClusterFixture cluster(2);
  ASSERT_TRUE(cluster.WaitReady());
  RequestSpec spec = MakeRequest(200, 1000, 5);
  auto got = cluster.Submit(spec);
  for (size_t dead : {0u, 1u}) {
    ASSERT_TRUE(got->WaitTokens(20 * (dead + 1)));
    cluster.workers[dead].reset();
    ASSERT_TRUE(cluster.WaitReady(false));
    cluster.AddWorker();
    ASSERT_TRUE(cluster.WaitReady());
  }
  ASSERT_TRUE(got->WaitEnd());
  cluster.ExpectAsOracleSays(spec, *got);
}

// One stage, then two and three on the same worker, then on two workers, then one again: under one stream.
TEST(Cluster, StagesChangeWhileTheyServe) {
  ClusterFixture cluster(1);
  ASSERT_TRUE(cluster.WaitReady());
  RequestSpec spec = MakeRequest(200, 3000, 11, 3);
  auto got = cluster.Submit(spec);
  size_t tokens = 50;
  for (const uint32_t num_stages : {2, 3, 0, 2, 1, 2}) {
    ASSERT_TRUE(got->WaitTokens(tokens));
    tokens += 150;
    if (num_stages == 0) {
      cluster.AddWorker();
      continue;
    }
    const auto scaled = cluster.Scale(num_stages);
    ASSERT_TRUE(scaled.ok()) << num_stages << ": " << scaled.status() << "\n"
                             << cluster.service->StatusJson();
    EXPECT_EQ(scaled->pipelines, 1u);
    EXPECT_GT(scaled->pause_us, 0u);
  }
  ASSERT_TRUE(got->WaitEnd());
  cluster.ExpectAsOracleSays(spec, *got);
}

TEST(Cluster, AScaleUnderWayIsAnsweredWhenTheCoordinatorStops) {
  ClusterFixture cluster(1);
  ASSERT_TRUE(cluster.WaitReady());
  std::thread asks([&] {
    for (uint32_t n = 2; cluster.Scale(n).ok(); n = n == 2 ? 3 : 2) {
    }
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  cluster.service->Stop();
  asks.join();
}

TEST(Cluster, FailedStepIsReplayed) {
  ClusterFixture cluster(2);
  ASSERT_TRUE(cluster.WaitReady());
  cluster.workers[1]->backend.fail_next_finish = absl::InternalError("by order of the test");
  RequestSpec spec = MakeRequest(200, 100, 6);
  auto got = cluster.Submit(spec);
  ASSERT_TRUE(got->WaitEnd());
  cluster.ExpectAsOracleSays(spec, *got);
  EXPECT_NE(cluster.service->MetricsText().find("strait_generation_tokens_total"),
            std::string::npos);
}

TEST(Cluster, CoordinatorsRestartFindsTheWorkersAgain) {
  auto cluster = std::make_unique<ClusterFixture>(2);
  ASSERT_TRUE(cluster->WaitReady());
  const std::string address = "127.0.0.1:" + std::to_string(cluster->service->grpc_port());
  cluster->service->Stop();
  cluster->service.reset();
  CoordinatorOptions options;
  options.core.num_stages = 2;
  options.core.term = 2;
  options.core.accept_untold = true;
  options.model = cluster->shape;
  options.attach.listen_address = address;
  auto made = CoordinatorService::Create(std::move(options));
  ASSERT_TRUE(made.ok()) << made.status();
  cluster->service = std::move(*made);
  ASSERT_TRUE(cluster->WaitReady());
  RequestSpec spec = MakeRequest(100, 50, 7);
  auto got = cluster->Submit(spec);
  ASSERT_TRUE(got->WaitEnd());
  cluster->ExpectAsOracleSays(spec, *got);
}

TEST(Cluster, CancelEndsOneOrAll) {
  ClusterFixture cluster(2);
  ASSERT_TRUE(cluster.WaitReady());
  RequestSpec spec = MakeRequest(10, 4000, 8, 2);
  auto got = cluster.Submit(spec);
  ASSERT_TRUE(got->WaitTokens(4));
  cluster.service->Cancel(got->id, 0);
  cluster.service->Cancel(got->id, std::nullopt);
  cluster.service->Cancel(RequestId{999'999}, std::nullopt);
  ASSERT_TRUE(got->WaitEnd());
  EXPECT_EQ(got->streams[0].reason, FinishReason::kCancelled);
  EXPECT_EQ(got->streams[1].reason, FinishReason::kCancelled);
}

TEST(Cluster, StoppingEndsWhatRuns) {
  ClusterFixture cluster(1);
  ASSERT_TRUE(cluster.WaitReady());
  auto got = cluster.Submit(MakeRequest(10, 4000, 9));
  ASSERT_TRUE(got->WaitTokens(1));
  cluster.service->Stop();
  ASSERT_TRUE(got->WaitEnd());
  EXPECT_EQ(got->streams[0].reason, FinishReason::kCancelled);
  auto late = cluster.Submit(MakeRequest(10, 1, 9));
  ASSERT_TRUE(late->WaitEnd());
  EXPECT_EQ(late->refused.code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace strait
