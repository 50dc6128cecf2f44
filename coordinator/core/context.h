// SPDX-License-Identifier: Apache-2.0
//
// Context is what the parts of Core share: the options, the model's shape, messages on their way
// out and counters.
//
// Owns:    the outbox. Borrowed by every part; Core owns it and outlives them.
// Thread:  loop thread only.
#pragma once

#include <utility>
#include <vector>

#include "coordinator/core/core.h"

namespace strait {

struct Context {
  const CoreOptions options;
  const ModelShape model;
  std::vector<CoreMessage> out;
  CoreStats stats;  // the counters of it; gauges are computed when asked

  template <class Message>
  void Send(Message message) {
    out.emplace_back(std::move(message));
  }
};

}  // namespace strait
