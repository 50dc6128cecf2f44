// SPDX-License-Identifier: Apache-2.0
//
// The load of `strait stress`: seeded requests, the streams that answer them, and whether a stream
// is what its reference was, to the last bit.
//
// Thread:  pure functions and plain data; RunStream: the caller's, a client is used by one thread.
// Errors:  in StreamOutcome::failure, in words.
// Why:     a log-probability is printed as the shortest decimal that reads back to the same float32:
//          equal decimals, read as doubles, are equal bits.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "coordinator/cli/http_client.h"
#include "proto/base/json.h"

namespace strait::cli {

struct LoadOptions {
  uint64_t seed = 1;
  uint32_t num_requests = 0;
  uint32_t min_rows = 64;  // of a sequence at its end: prompt and answer
  uint32_t max_rows = 2048;
  uint32_t output_tokens = 256;  // at most
  uint32_t vocabulary = 256;
  std::string model;
};

struct StressRequest {
  json::Object body;
  uint32_t prompt_tokens = 0;
  uint32_t output_tokens = 0;
  uint32_t choices = 1;
};

// Lengths are drawn evenly by their logarithm; a half is greedy, the others sample by a seed of their own, some with
// penalties, some with two choices. The same options give the same requests.
// REQUIRES: 2 <= min_rows <= max_rows.
std::vector<StressRequest> MakeRequests(const LoadOptions& options);

// `salt`: of the prefix cache; empty: none.
std::string BodyOf(const StressRequest& request, std::string_view salt);

struct ChoiceOutcome {
  std::vector<uint32_t> ids;
  std::vector<double> logprobs;
  std::string finish;
  std::vector<double> at_s;  // when its client had each token, on the clock that was given
};

struct StreamOutcome {
  std::string name;  // "cmpl-…"
  std::vector<ChoiceOutcome> choices;
  std::string failure;  // empty: it ended well
};

// What the events of one stream say, one after the other.
class StreamReader {
 public:
  explicit StreamReader(uint32_t choices) { outcome_.choices.resize(choices); }
  // False: it has failed.
  bool Take(std::string_view data, double at_s);
  // After the last event.
  StreamOutcome End() &&;

 private:
  bool Fail(std::string why);
  bool TakeChoice(const json::Object& choice, double at_s);

  StreamOutcome outcome_;
  bool done_ = false;
};

using StressClock = std::chrono::steady_clock;

// `last_sign`, in microseconds since `start`, is set at each event: by it others see a stream that is silent.
StreamOutcome RunStream(HttpClient& client, const std::string& body, uint32_t choices,
                        StressClock::time_point start, std::atomic<int64_t>* last_sign_us);

// How a stream differs from its reference, in words; empty: in nothing.
std::string Difference(const StreamOutcome& got, const StreamOutcome& reference);

// The pause of a move at the client, in milliseconds: the gap between the last token of the old pipeline, which is at
// position `rows_at_switch`, and the next one, less the median gap of the up to 50 tokens before. Null where the
// sequence had no such tokens yet: fewer than kMinGapsBefore gaps before, or none after.
inline constexpr size_t kGapsBefore = 50;
inline constexpr size_t kMinGapsBefore = 8;
std::optional<double> PauseMs(const ChoiceOutcome& choice, uint32_t prompt_tokens,
                              uint64_t rows_at_switch);

}  // namespace strait::cli
