// SPDX-License-Identifier: Apache-2.0
//
// EngineMetricsText writes CoreStats as Prometheus text. Names are documented by their HELP lines.
//
// Thread:  pure function.
#pragma once

#include <string>

#include "coordinator/core/core.h"

namespace strait {

std::string EngineMetricsText(const CoreStats& stats, uint64_t workers_attached);

}  // namespace strait
