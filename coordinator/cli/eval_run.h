// SPDX-License-Identifier: Apache-2.0
//
// EvaluateTarget measures one server: log-loss of windows of text, recall by distance, rates, bytes
// of cache.
//
// Thread:  the caller's; prompts are scored by `concurrency` threads of its own, one connection
//          each, that have ended when it returns.
// Errors:  the first one that anything met (the rest is then given up): EvalServer's, those of
//          making windows and contexts, Cancelled.
// Limits:  kMaxEvalConcurrency.
// Why:     everything that can be wrong with text and flags is found out before the first prompt is
//          scored.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/cli/drive.h"
#include "coordinator/cli/eval_recall.h"
#include "coordinator/cli/eval_text.h"
#include "coordinator/cli/eval_windows.h"
#include "coordinator/cli/http_client.h"
#include "coordinator/cli/terminal.h"

namespace strait::cli {

inline constexpr uint32_t kMaxEvalConcurrency = 256;
inline constexpr uint32_t kDefaultWindow = 8192;

struct EvalOptions {
  uint32_t window = 0;       // tokens; 0: kDefaultWindow, or context_tokens when that is less
  uint32_t max_windows = 0;  // 0: all
  std::vector<uint32_t> edges = {0, 1024, 4096, 8192};
  bool default_edges = true;
  std::vector<uint32_t> distances;
  uint32_t answers = 2000;
  uint64_t seed = 1;
  uint32_t concurrency = 4;
  uint32_t decode_tokens = 64;
  // The context to plan with: the least of all servers'. 0: this server's.
  uint32_t context_tokens = 0;
  std::string api_key;
};

struct WindowResult {
  TokenIds ids;
  size_t num_scored = 0;
  double loss = 0;                  // nats a token, over all scored positions
  std::vector<double> bucket_loss;  // the same by bucket
  double num_bytes = 0;             // of the text that the scored tokens are
};

struct RecallResult {
  uint32_t distance = 0;
  std::vector<RecallContext> contexts;
  std::vector<uint8_t> right;  // of all answers, context by context
};

struct TargetResult {
  std::string name;  // a folder or a URL
  std::string model;
  uint32_t max_model_len = 0;
  uint32_t window = 0;
  size_t num_special = 0;
  std::vector<Bucket> buckets;
  std::vector<WindowResult> windows;
  std::vector<RecallResult> recall;
  size_t scored_tokens = 0;  // of windows and contexts
  double score_s = 0;
  double decode_tokens_per_s = 0;
  size_t decode_tokens = 0;
  std::vector<double> cache_bytes_per_token;  // by layer; empty when the server does not tell
  std::string cache_missing;                  // why it is empty
};

// The longest prompt of a model, as its server tells.
absl::StatusOr<uint32_t> ContextOf(HttpClient& client);

absl::StatusOr<TargetResult> EvaluateTarget(const EvalOptions& options, const TextFile& text,
                                            const Url& url, Terminal* terminal, EventFd* cancel);

}  // namespace strait::cli
