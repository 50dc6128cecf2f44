// SPDX-License-Identifier: Apache-2.0
//
// strait_sim runs simulations by their seeds: one with --trace to look into a failure, or many.
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/sim/simulation.h"

namespace {

volatile uint64_t running_seed = 0;

extern "C" void OnCrash(int signal) {
  std::fprintf(stderr, "crashed in seed %llu; replay: strait_sim --seed %llu --trace\n",
               static_cast<unsigned long long>(running_seed),
               static_cast<unsigned long long>(running_seed));
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t seed = 1;
  uint64_t count = 1;
  bool trace = false;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--trace") == 0) {
      trace = true;
    } else if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::strcmp(argv[i], "--count") == 0 && i + 1 < argc) {
      count = std::strtoull(argv[++i], nullptr, 10);
    } else {
      std::fprintf(stderr, "usage: strait_sim [--seed N] [--count N] [--trace]\n");
      return 2;
    }
  }
  for (const int signal : {SIGABRT, SIGFPE, SIGSEGV}) std::signal(signal, OnCrash);
  uint64_t failures = 0;
  for (uint64_t i = 0; i < count; ++i) {
    running_seed = seed + i;
    const strait::sim::Outcome outcome = strait::sim::RunSimulation(seed + i, trace);
    if (outcome.violation.empty()) continue;
    ++failures;
    std::printf("seed %llu: %s\n  replay: strait_sim --seed %llu --trace\n",
                static_cast<unsigned long long>(seed + i), outcome.violation.c_str(),
                static_cast<unsigned long long>(seed + i));
  }
  std::printf("%llu of %llu seeds failed\n", static_cast<unsigned long long>(failures),
              static_cast<unsigned long long>(count));
  return failures == 0 ? 0 : 1;
}
