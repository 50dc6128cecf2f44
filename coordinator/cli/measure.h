// SPDX-License-Identifier: Apache-2.0
//
// What `strait bench` measures and how it sums it up.
//
// Thread:  plain data.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "proto/base/json.h"

namespace strait::cli {

// One request, as its client saw it. Times in seconds.
struct RequestResult {
  std::string error;          // empty: it succeeded
  double first_token_s = 0;   // from sending to the first event with a token
  double total_s = 0;         // to the last event with a token
  int64_t prompt_tokens = 0;  // as the server counts
  int64_t output_tokens = 0;
  bool is_short =
      false;  // fewer tokens came than were asked for, although the end was to be ignored
  std::vector<double> gaps_s;  // between one event with a token and the next
};

// One level of concurrency.
struct RunResult {
  uint32_t concurrency = 0;
  double duration_s = 0;
  std::vector<RequestResult> requests;
};

// The value below which share `q` of the values lies, between neighbours by linear interpolation; 0
// of none.
double Percentile(std::vector<double> values, double q);

// Time per output token of one request: from the first token to the last, over the tokens after the
// first. Negative when the request has fewer than two.
double TimePerOutputToken(const RequestResult& request);

// The figures of a run: counts, errors by text, tokens/s, and mean, p50, p90, p99, max in
// milliseconds of ttft, tpot, itl (gap between events) and e2e.
json::Object Summarize(const RunResult& run);

}  // namespace strait::cli
