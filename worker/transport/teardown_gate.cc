// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/teardown_gate.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "proto/rpc/clock.h"

namespace strait {

TeardownGate::Place::Place(TeardownGate* gate) : gate_(gate) {
  std::lock_guard lock(gate_->mu_);
  gate_->places_.push_back(this);
}

TeardownGate::Place::~Place() { Gone(); }

bool TeardownGate::Place::Enter(uint64_t patience_us) {
  std::lock_guard lock(gate_->mu_);
  if (gate_->OthersEnding(this) == 0) {
    held_since_us_ = 0;
  } else {
    const uint64_t now_us = MonotonicMicros();
    if (held_since_us_ == 0) held_since_us_ = now_us;
    if (now_us < held_since_us_ + patience_us) return false;
  }
  entered_ = on_device_ = true;
  return true;
}

void TeardownGate::Place::Leave() {
  if (!std::exchange(entered_, false)) return;
  {
    std::lock_guard lock(gate_->mu_);
    on_device_ = false;
    gate_->used_us_ = MonotonicMicros();
  }
  gate_->changed_.notify_all();
}

void TeardownGate::Place::End() {
  {
    std::lock_guard lock(gate_->mu_);
    ending_ = true;
  }
  gate_->changed_.notify_all();
}

void TeardownGate::Place::Stop() {
  {
    std::lock_guard lock(gate_->mu_);
    ending_ = stopped_ = true;
  }
  gate_->changed_.notify_all();
}

void TeardownGate::Place::Gone() {
  {
    std::lock_guard lock(gate_->mu_);
    std::erase(gate_->places_, this);
  }
  gate_->changed_.notify_all();
}

bool TeardownGate::Place::IsLeftAlone(uint64_t idle_us) const {
  std::lock_guard lock(gate_->mu_);
  if (gate_->OthersEnding(this) > 0) return true;
  return !gate_->OthersOnDevice(this) && MonotonicMicros() >= gate_->used_us_ + idle_us;
}

size_t TeardownGate::Place::others_ending() const {
  std::lock_guard lock(gate_->mu_);
  return gate_->OthersEnding(this);
}

bool TeardownGate::Place::AwaitTurn(uint64_t until_us) {
  std::unique_lock lock(gate_->mu_);
  const uint64_t now_us = MonotonicMicros();
  const std::chrono::microseconds patience(until_us - std::min(until_us, now_us));
  return gate_->changed_.wait_for(lock, patience,
                                  [this] { return ending_ || gate_->OthersEnding(this) == 0; });
}

bool TeardownGate::Place::AwaitOthers(uint64_t patience_us) {
  std::unique_lock lock(gate_->mu_);
  return gate_->changed_.wait_for(lock, std::chrono::microseconds(patience_us),
                                  [this] { return !gate_->OthersOnDevice(this); });
}

size_t TeardownGate::OthersEnding(const Place* place) const {
  return static_cast<size_t>(
      std::count_if(places_.begin(), places_.end(),
                    [place](const Place* other) { return other != place && other->ending_; }));
}

bool TeardownGate::OthersOnDevice(const Place* place) const {
  return std::any_of(places_.begin(), places_.end(), [place](const Place* other) {
    return other != place && other->on_device_ && !other->stopped_;
  });
}

}  // namespace strait
