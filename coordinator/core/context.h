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
  // Of pipelines that are formed from now on: as the options say, until a scale succeeded.
  uint32_t num_stages = options.num_stages;
  bool replicates = false;                  // a worker offers memory for copies of others' blocks
  uint32_t num_hosts = options.num_stages;  // workers that such a one needs at least

  template <class Message>
  void Send(Message message) {
    out.emplace_back(std::move(message));
  }
};

}  // namespace strait
