// SPDX-License-Identifier: Apache-2.0
#include "worker/service/loader.h"

#include <chrono>
#include <utility>

#include "proto/rpc/clock.h"
#include "worker/service/service.h"

namespace strait {
namespace {

constexpr uint64_t kProgressPeriodUs = 200'000;
constexpr std::chrono::seconds kIdleWait(1);

}  // namespace

StageLoader::StageLoader(Backend* backend, Progress progress, Done done)
    : backend_(backend),
      progress_(std::move(progress)),
      done_(std::move(done)),
      jobs_(kMaxHostedStages),
      thread_([this] { Run(); }) {}

StageLoader::~StageLoader() {
  stop_ = true;
  jobs_.Push({});  // wakes the thread
  thread_.join();
}

void StageLoader::Enqueue(LoadJob job) { jobs_.Push(std::move(job)); }

void StageLoader::Run() {
  while (true) {
    for (const LoadJob& job : jobs_.PopAll(kIdleWait)) {
      if (stop_) return;
      if (job.session < least_session_) {
        done_(job, absl::CancelledError("the session that wanted the stage has ended"));
        continue;
      }
      busy_ = true;
      std::atomic<uint64_t> told_us = 0;
      auto loaded = backend_->Load(job.spec, [&](uint64_t bytes, uint64_t total) {
        uint64_t last_us = told_us;
        const uint64_t now_us = MonotonicMicros();
        if (bytes < total && now_us < last_us + kProgressPeriodUs) return;
        // One of several loading threads tells.
        if (told_us.compare_exchange_strong(last_us, now_us)) progress_(job, bytes, total);
      });
      busy_ = false;
      done_(job, std::move(loaded));
    }
    if (stop_) return;
  }
}

}  // namespace strait
