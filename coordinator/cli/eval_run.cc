// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/eval_run.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <string_view>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/api_calls.h"
#include "coordinator/cli/eval_server.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kProgressMs = 200;
constexpr uint32_t kDecodePromptTokens = 128;

class Evaluation {
 public:
  Evaluation(const EvalOptions& options, const TextFile& text, const Url& url, Terminal* terminal,
             EventFd* cancel)
      : options_(options), text_(text), url_(url), terminal_(terminal), cancel_(cancel) {}

  absl::StatusOr<TargetResult> Run();

 private:
  absl::Status Prepare(HttpClient& client);
  absl::Status TokenizeText(EvalServer& server);
  absl::Status PlanRecall(EvalServer& server);
  absl::Status ScoreWindows();
  absl::Status ScoreRecall(RecallResult& recall);
  absl::Status MeasureDecode(HttpClient& client);
  // Calls work(server, 0 … count - 1) from several threads; the first error ends all.
  absl::Status ForAll(std::string_view what, size_t count,
                      const std::function<absl::Status(EvalServer&, size_t)>& work);

  const EvalOptions& options_;
  const TextFile& text_;
  const Url& url_;
  Terminal* const terminal_;
  EventFd* const cancel_;
  TargetResult result_;
  uint32_t context_tokens_ = 0;
  TokenIds special_;
  std::vector<TokenIds> documents_;  // without specials
};

absl::Status Evaluation::ForAll(std::string_view what, size_t count,
                                const std::function<absl::Status(EvalServer&, size_t)>& work) {
  std::atomic<size_t> next = 0, finished = 0;
  std::mutex mu;
  absl::Status first;  // guarded by mu
  const auto serve = [&] {
    HttpClient client(url_, options_.api_key, cancel_->fd());
    EvalServer server(&client, result_.model);
    for (size_t i = next++; i < count && !cancel_->IsSet(); i = next++) {
      const absl::Status status = work(server, i);
      if (!status.ok()) {
        const std::lock_guard<std::mutex> lock(mu);
        if (first.ok()) {
          first = absl::Status(status.code(), absl::StrCat(ToAbsl(what), " ", i + 1, " of ", count,
                                                           ": ", std::string(status.message())));
        }
        cancel_->Set();
      }
      ++finished;
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 0; i < std::min<size_t>(options_.concurrency, count); ++i) {
    threads.emplace_back(serve);
  }
  // They do the work; this thread only shows how far they are.
  while (finished < count && !cancel_->IsSet()) {
    terminal_->Progress(absl::StrCat(ToAbsl(what), ": ", finished.load(), " of ", count),
                        static_cast<double>(finished) / static_cast<double>(count));
    WaitReadable(cancel_->fd(), kProgressMs);
  }
  for (std::thread& thread : threads) thread.join();
  terminal_->EndProgress();
  STRAIT_RETURN_IF_ERROR(first);
  return cancel_->IsSet() ? absl::CancelledError("cancelled") : absl::OkStatus();
}

absl::Status Evaluation::TokenizeText(EvalServer& server) {
  STRAIT_ASSIGN_OR_RETURN(special_, server.LeadingSpecials());
  if (result_.window < special_.size() + 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("--window ", result_.window, ": must be at least ", special_.size() + 2));
  }
  documents_.resize(text_.documents.size());
  STRAIT_RETURN_IF_ERROR(ForAll(
      "Tokenizing, document", documents_.size(), [&](EvalServer& own, size_t i) -> absl::Status {
        STRAIT_ASSIGN_OR_RETURN(documents_[i], own.Tokenize(text_.documents[i], false));
        return absl::OkStatus();
      }));
  STRAIT_ASSIGN_OR_RETURN(
      std::vector<TokenIds> windows,
      CutWindows(text_, documents_, special_, result_.window, options_.max_windows));
  result_.num_special = special_.size();
  result_.windows.resize(windows.size());
  for (size_t i = 0; i < windows.size(); ++i) result_.windows[i].ids = std::move(windows[i]);
  return absl::OkStatus();
}

absl::Status Evaluation::PlanRecall(EvalServer& server) {
  if (options_.distances.empty()) return absl::OkStatus();
  RecallParts parts;
  parts.special = special_;
  STRAIT_ASSIGN_OR_RETURN(parts.define, server.Tokenize("\n@", false));
  STRAIT_ASSIGN_OR_RETURN(parts.ask, server.Tokenize("\n?", false));
  const auto common = CommonWords();
  std::vector<TokenIds> words(common.size());
  STRAIT_RETURN_IF_ERROR(
      ForAll("Tokenizing, word", words.size(), [&](EvalServer& own, size_t i) -> absl::Status {
        STRAIT_ASSIGN_OR_RETURN(words[i],
                                own.Tokenize(absl::StrCat(" ", ToAbsl(common[i])), false));
        return absl::OkStatus();
      }));
  parts.words = ChooseWords(words);
  if (parts.words.size() < 2) {
    return absl::FailedPreconditionError(
        "the model's tokenizer makes no tokens of English words: --recall cannot be asked of it");
  }
  for (const TokenIds& document : documents_) {
    parts.filler.insert(parts.filler.end(), document.begin(), document.end());
  }
  for (const uint32_t distance : options_.distances) {
    RecallResult& recall = result_.recall.emplace_back();
    recall.distance = distance;
    STRAIT_ASSIGN_OR_RETURN(recall.contexts, MakeRecallContexts(parts, distance, context_tokens_,
                                                                options_.answers, options_.seed));
  }
  return absl::OkStatus();
}

absl::Status Evaluation::Prepare(HttpClient& client) {
  terminal_->Progress("Asking the server for its model", -1);
  STRAIT_ASSIGN_OR_RETURN(const ModelInfo info, FirstModel(client));
  result_.model = info.id;
  STRAIT_ASSIGN_OR_RETURN(result_.max_model_len, ContextOf(client));
  context_tokens_ = options_.context_tokens > 0 ? options_.context_tokens : result_.max_model_len;
  result_.window =
      options_.window > 0 ? options_.window : std::min(kDefaultWindow, context_tokens_);
  for (const uint32_t needed : {result_.window, context_tokens_}) {
    if (needed <= result_.max_model_len) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "a window of ", needed, " tokens is more than the context of ", url_.Text(), ", ",
        result_.max_model_len, " tokens; use --window ", result_.max_model_len, " or less"));
  }
  STRAIT_ASSIGN_OR_RETURN(result_.buckets,
                          MakeBuckets(options_.edges, options_.default_edges, result_.window));
  EvalServer server(&client, result_.model);
  STRAIT_RETURN_IF_ERROR(TokenizeText(server));
  STRAIT_RETURN_IF_ERROR(PlanRecall(server));
  documents_.clear();
  return absl::OkStatus();
}

absl::Status Evaluation::ScoreWindows() {
  return ForAll("Perplexity, window", result_.windows.size(),
                [&](EvalServer& server, size_t i) -> absl::Status {
                  WindowResult& out = result_.windows[i];
                  STRAIT_ASSIGN_OR_RETURN(const PromptScore score, server.Score(out.ids, false));
                  out.num_scored = score.logprobs.size();
                  out.loss = MeanLoss(score.logprobs, {0, result_.window});
                  for (const Bucket& bucket : result_.buckets) {
                    out.bucket_loss.push_back(MeanLoss(score.logprobs, bucket));
                  }
                  return absl::OkStatus();
                });
}

absl::Status Evaluation::ScoreRecall(RecallResult& recall) {
  std::vector<std::vector<uint8_t>> right(recall.contexts.size());
  STRAIT_RETURN_IF_ERROR(
      ForAll(absl::StrCat("Recall at ", recall.distance, ", context"), recall.contexts.size(),
             [&](EvalServer& server, size_t i) -> absl::Status {
               const RecallContext& context = recall.contexts[i];
               STRAIT_ASSIGN_OR_RETURN(const PromptScore score, server.Score(context.ids, true));
               for (const RecallAnswer& answer : context.answers) {
                 const auto first = score.is_top.begin() + (answer.position - 1);
                 right[i].push_back(std::all_of(first, first + answer.num_tokens,
                                                [](uint8_t top) { return top != 0; }));
               }
               return absl::OkStatus();
             }));
  for (const auto& some : right) recall.right.insert(recall.right.end(), some.begin(), some.end());
  return absl::OkStatus();
}

absl::Status Evaluation::MeasureDecode(HttpClient& client) {
  const uint32_t output = std::min(options_.decode_tokens, result_.max_model_len - 1);
  const size_t prompt_tokens = std::min<size_t>(
      {kDecodePromptTokens, result_.windows[0].ids.size(), result_.max_model_len - output});
  terminal_->Progress(absl::StrCat("Decoding ", output, " tokens"), -1);
  const auto begin = result_.windows[0].ids.begin();
  const json::Object request = {
      {"model", result_.model},
      {"prompt", json::Array(begin, begin + static_cast<ptrdiff_t>(prompt_tokens))},
      {"max_tokens", output},
      {"temperature", 0},
      {"ignore_eos", true},
      {"stream", true},
      {"stream_options", json::Object{{"include_usage", true}}}};
  const RequestResult run = MeasureStream(client, boost::json::serialize(request), output);
  if (cancel_->IsSet()) return absl::CancelledError("cancelled");
  if (!run.error.empty()) {
    return absl::InternalError(absl::StrCat(url_.Text(), ": decoding: ", run.error));
  }
  result_.decode_tokens = static_cast<size_t>(run.output_tokens);
  if (const double s = TimePerOutputToken(run); s > 0) result_.decode_tokens_per_s = 1 / s;
  return absl::OkStatus();
}

absl::StatusOr<TargetResult> Evaluation::Run() {
  HttpClient client(url_, options_.api_key, cancel_->fd());
  STRAIT_RETURN_IF_ERROR(Prepare(client));

  const Clock::time_point start = Clock::now();
  STRAIT_RETURN_IF_ERROR(ScoreWindows());
  for (RecallResult& recall : result_.recall) STRAIT_RETURN_IF_ERROR(ScoreRecall(recall));
  result_.score_s = std::chrono::duration<double>(Clock::now() - start).count();
  for (const WindowResult& window : result_.windows) result_.scored_tokens += window.num_scored;
  for (const RecallResult& recall : result_.recall) {
    for (const RecallContext& context : recall.contexts) {
      result_.scored_tokens += context.ids.size() - 1;
    }
  }

  STRAIT_RETURN_IF_ERROR(ForAll(
      "Counting bytes, window", result_.windows.size(),
      [&](EvalServer& server, size_t i) -> absl::Status {
        // The first token is not scored; of the specials before text, the rest has no bytes.
        const size_t skip = std::max<size_t>(1, special_.size());
        STRAIT_ASSIGN_OR_RETURN(const std::string text,
                                server.Detokenize(std::span(result_.windows[i].ids).subspan(skip)));
        result_.windows[i].num_bytes = static_cast<double>(WholeCharacterBytes(text));
        return absl::OkStatus();
      }));
  STRAIT_RETURN_IF_ERROR(MeasureDecode(client));
  EvalServer server(&client, result_.model);
  absl::StatusOr<std::vector<double>> cache = server.CacheBytesPerToken();
  if (cache.ok()) {
    result_.cache_bytes_per_token = *std::move(cache);
  } else if (absl::IsNotFound(cache.status())) {
    result_.cache_missing = std::string(cache.status().message());
  } else {
    return cache.status();
  }
  return std::move(result_);
}

}  // namespace

absl::StatusOr<uint32_t> ContextOf(HttpClient& client) {
  STRAIT_ASSIGN_OR_RETURN(const ModelInfo info, FirstModel(client));
  if (info.max_model_len < 4 || info.max_model_len > INT32_MAX) {
    return absl::InternalError(absl::StrCat(client.url().Text(),
                                            " does not tell how long a prompt may be ",
                                            "(max_model_len in /v1/models)"));
  }
  return static_cast<uint32_t>(info.max_model_len);
}

absl::StatusOr<TargetResult> EvaluateTarget(const EvalOptions& options, const TextFile& text,
                                            const Url& url, Terminal* terminal, EventFd* cancel) {
  absl::StatusOr<TargetResult> result = Evaluation(options, text, url, terminal, cancel).Run();
  terminal->EndProgress();
  return result;
}

}  // namespace strait::cli
