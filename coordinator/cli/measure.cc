// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/measure.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace strait::cli {
namespace {

json::Object Milliseconds(const std::vector<double>& seconds) {
  json::Object out;
  const auto set = [&](const char* key, double value) { out[key] = value * 1e3; };
  const double count = static_cast<double>(seconds.size());
  set("mean", seconds.empty() ? 0 : std::accumulate(seconds.begin(), seconds.end(), 0.0) / count);
  set("p50", Percentile(seconds, 0.50));
  set("p90", Percentile(seconds, 0.90));
  set("p99", Percentile(seconds, 0.99));
  set("max", seconds.empty() ? 0 : *std::max_element(seconds.begin(), seconds.end()));
  return out;
}

}  // namespace

double Percentile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double at = q * static_cast<double>(values.size() - 1);
  const size_t low = static_cast<size_t>(at);
  const size_t high = std::min(low + 1, values.size() - 1);
  return values[low] + (values[high] - values[low]) * (at - static_cast<double>(low));
}

double TimePerOutputToken(const RequestResult& request) {
  if (request.output_tokens < 2) return -1;
  return (request.total_s - request.first_token_s) / static_cast<double>(request.output_tokens - 1);
}

json::Object Summarize(const RunResult& run) {
  std::vector<double> ttft, tpot, itl, e2e;
  std::map<std::string, int64_t> errors;
  int64_t prompt_tokens = 0, output_tokens = 0, num_failed = 0, num_short = 0;
  for (const RequestResult& request : run.requests) {
    if (!request.error.empty()) {
      ++num_failed;
      ++errors[request.error];
      continue;
    }
    num_short += request.is_short ? 1 : 0;
    prompt_tokens += request.prompt_tokens;
    output_tokens += request.output_tokens;
    ttft.push_back(request.first_token_s);
    e2e.push_back(request.total_s);
    if (const double t = TimePerOutputToken(request); t >= 0) tpot.push_back(t);
    itl.insert(itl.end(), request.gaps_s.begin(), request.gaps_s.end());
  }
  const auto rate = [&](int64_t tokens) {
    return run.duration_s > 0 ? static_cast<double>(tokens) / run.duration_s : 0;
  };
  json::Object out;
  out["concurrency"] = run.concurrency;
  out["requests"] = run.requests.size();
  out["succeeded"] = static_cast<int64_t>(run.requests.size()) - num_failed;
  out["failed"] = num_failed;
  json::Object by_text;
  for (const auto& [text, count] : errors) by_text[text] = count;
  out["errors"] = std::move(by_text);
  out["short_outputs"] = num_short;
  out["duration_s"] = run.duration_s;
  out["prompt_tokens"] = prompt_tokens;
  out["output_tokens"] = output_tokens;
  out["prompt_tokens_per_s"] = rate(prompt_tokens);
  out["output_tokens_per_s"] = rate(output_tokens);
  out["ttft_ms"] = Milliseconds(ttft);
  out["tpot_ms"] = Milliseconds(tpot);
  out["itl_ms"] = Milliseconds(itl);
  out["e2e_ms"] = Milliseconds(e2e);
  return out;
}

}  // namespace strait::cli
