// SPDX-License-Identifier: Apache-2.0
#include "worker/service/loader.h"

#include <chrono>
#include <utility>

#include "proto/rpc/clock.h"

namespace strait {
namespace {

constexpr uint64_t kProgressPeriodUs = 200'000;
constexpr std::chrono::seconds kIdleWait(1);

}  // namespace

StageLoader::StageLoader(Backend* backend, Progress progress, Done done)
    : backend_(backend),
      progress_(std::move(progress)),
      done_(std::move(done)),
      orders_(kMaxHostedStages),
      thread_([this] { Run(); }) {}

StageLoader::~StageLoader() {
  stop_ = true;
  orders_.Push({});  // wakes the thread
  thread_.join();
}

void StageLoader::Enqueue(LoadOrder order) { orders_.Push(std::move(order)); }

void StageLoader::Run() {
  while (true) {
    for (const LoadOrder& order : orders_.PopAll(kIdleWait)) {
      if (stop_) return;
      if (order.serial <= cancelled_) {
        done_(order, absl::CancelledError("nobody wants the stage any more"));
        continue;
      }
      busy_ = true;
      std::atomic<uint64_t> told_us = 0;
      auto loaded = backend_->Load(order.spec, [&](uint64_t bytes, uint64_t total) {
        uint64_t last_us = told_us;
        const uint64_t now_us = MonotonicMicros();
        if (bytes < total && now_us < last_us + kProgressPeriodUs) return;
        // One of several loading threads tells.
        if (told_us.compare_exchange_strong(last_us, now_us)) progress_(order, bytes, total);
      });
      busy_ = false;
      done_(order, std::move(loaded));
    }
    if (stop_) return;
  }
}

}  // namespace strait
