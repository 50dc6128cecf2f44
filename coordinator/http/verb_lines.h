// SPDX-License-Identifier: Apache-2.0
//
// What the elastic verbs' routes answer, as JSON: coordinator/http/README.md describes the members.
//
// Thread:  pure functions.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "coordinator/engine.h"

namespace strait {

// {"event":"progress", …}, with a line end.
std::string LineOf(const MoveReport& report, std::string_view event);
std::string LineOf(const DrainReport& report, std::string_view event);
std::string LineOf(const ScaleReport& report, std::string_view event);

// The end of a scale: as one object, or as the last line of several. Without an outcome it was a dry run.
std::string OutcomeJson(const ScaleOutcome& outcome);
std::string PlansJson(const ScaleReport& report);
std::string ScaleEndLine(const std::optional<ScaleOutcome>& outcome, const ScaleReport& last);

}  // namespace strait
