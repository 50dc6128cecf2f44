// SPDX-License-Identifier: Apache-2.0
//
// token_latency measures what coordinator and transport add to a token: a cluster over real sockets
// whose model costs next to nothing decodes one sequence, and the time between tokens is what is
// left.
//
//   token_latency [stages] [tokens] [grant_depth]   prints one JSON line
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "proto/rpc/clock.h"
#include "tests/coordinator/service/cluster_fixture.h"

namespace strait {
namespace {

class Stopwatch : public Recorder {
 public:
  Stopwatch() : Recorder(1) {}
  void OnToken(uint32_t i, TokenInfo token) override {
    at_us.push_back(MonotonicMicros());
    Recorder::OnToken(i, std::move(token));
  }
  std::vector<uint64_t> at_us;
};

int Measure(uint32_t stages, uint32_t tokens, uint32_t grant_depth) {
  CoreOptions core;
  if (grant_depth > 0) core.grant_depth = grant_depth;
  ClusterFixture cluster(stages, 1, core);
  if (!cluster.WaitReady()) return 1;
  auto stopwatch = std::make_shared<Stopwatch>();
  cluster.service->Submit(MakeRequest(8, tokens, 1), stopwatch);
  if (!stopwatch->WaitEnd() || stopwatch->at_us.size() != tokens) return 1;
  std::vector<uint64_t> gaps_us;
  for (size_t i = 1; i < stopwatch->at_us.size(); ++i) {
    gaps_us.push_back(stopwatch->at_us[i] - stopwatch->at_us[i - 1]);
  }
  std::sort(gaps_us.begin(), gaps_us.end());
  const double mean_us = static_cast<double>(stopwatch->at_us.back() - stopwatch->at_us.front()) /
                         static_cast<double>(gaps_us.size());
  std::printf("{\"stages\":%u,\"tokens\":%u,\"mean_us\":%.1f,\"p50_us\":%lu,\"p99_us\":%lu}\n",
              stages, tokens, mean_us, static_cast<unsigned long>(gaps_us[gaps_us.size() / 2]),
              static_cast<unsigned long>(gaps_us[gaps_us.size() * 99 / 100]));
  return 0;
}

}  // namespace
}  // namespace strait

int main(int argc, char** argv) {
  const int stages = argc > 1 ? std::atoi(argv[1]) : 2;
  const int tokens = argc > 2 ? std::atoi(argv[2]) : 2000;
  const int depth = argc > 3 ? std::atoi(argv[3]) : 0;  // 0: the default
  if (stages < 1 || stages > 6 || tokens < 2 || tokens > 4000 || depth < 0 || depth > 16) {
    std::fprintf(stderr, "usage: token_latency [stages 1-6] [tokens 2-4000] [grant depth 1-16]\n");
    return 2;
  }
  return strait::Measure(static_cast<uint32_t>(stages), static_cast<uint32_t>(tokens),
                         static_cast<uint32_t>(depth));
}
