// SPDX-License-Identifier: Apache-2.0
//
// What the status JSON says of scales and plans; coordinator/core/STATUS.md documents it.
//
// Thread:  pure functions.
#pragma once

#include "coordinator/core/scale.h"
#include "proto/base/json.h"

namespace strait {

json::Object ReasonJson(const PlanReason& why);
json::Object ScaleJson(const ScaleReport& report);
json::Object LastScaleJson(const ScaleEnded& ended);

}  // namespace strait
