// SPDX-License-Identifier: Apache-2.0
//
// The figures of `strait eval`, from what was measured: as JSON (README.md in this folder documents
// every member), and as tables for a terminal, which are made of that JSON.
//
// Thread:  pure functions.
// Why:     tables show nothing that the JSON lacks, since they read it.
#pragma once

#include <string>
#include <vector>

#include "coordinator/cli/eval_run.h"
#include "coordinator/cli/eval_stats.h"
#include "coordinator/cli/eval_text.h"
#include "proto/base/json.h"

namespace strait::cli {

json::Object TargetJson(const TargetResult& target);

// Second less first. Of equal tokenizations: log-loss by document and bucket, recall by question.
// Otherwise bits per byte alone, and `note` says so.
json::Object ComparisonJson(const TargetResult& first, const TargetResult& second);

// One or two targets; two are compared.
json::Object ReportJson(const EvalOptions& options, const TextFile& text,
                        const std::vector<TargetResult>& targets);

std::string ReportTables(const json::Object& report);

}  // namespace strait::cli
