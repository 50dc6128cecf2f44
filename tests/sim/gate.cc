// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/gate.h"

#include <algorithm>
#include <utility>

namespace strait::sim {

void Gate::Pass(std::function<void()> what) {
  if (since_us_ == 0 && waiting_.empty()) return what();
  waiting_.push_back(std::move(what));
}

void Gate::Shut(uint64_t us) {
  if (since_us_ == 0) since_us_ = world_->now_us();
  until_us_ = std::max(until_us_, world_->now_us() + us);
  world_->At(until_us_, [this] { Open(); });
}

void Gate::Open() {
  if (world_->now_us() < until_us_ || since_us_ == 0) return;  // shut for longer meanwhile
  const uint64_t us = world_->now_us() - std::exchange(since_us_, 0);
  ++num_shut_;
  shut_us_ += us;
  on_open_(us);
  while (!waiting_.empty() && world_->violation().empty()) {
    const std::function<void()> what = std::move(waiting_.front());
    waiting_.pop_front();
    what();
  }
}

}  // namespace strait::sim
