// SPDX-License-Identifier: Apache-2.0
//
// CompletionExchange carries one completion request through the engine and its answer to the
// client.
//
// Owns:    the request, its choices, itself: the engine holds it as listener until the request has
//          ended.
// Borrows: the engine, which outlives the server.
// Thread:  listener methods only enqueue; everything else runs in the Responder's posts, one at a
//          time.
// Errors:  before the answer begins: a status and a JSON error; in a stream: an error event, then
//          its end. A client that goes away, a choice that fails and a stop string cancel in the
//          engine at once.
// Limits:  queued events: at most what the request may generate.
// Why:     a stream begins when the engine has admitted the request, so that a refusal keeps its
//          status. A token that may be the last one waits for the event behind it, which the
//          engine sends with it: the chunk of the last token carries finish_reason.
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "coordinator/engine.h"
#include "coordinator/http/choice.h"
#include "coordinator/http/completion_json.h"
#include "coordinator/http/completion_request.h"
#include "coordinator/http/message.h"
#include "coordinator/http/metrics.h"

namespace strait {

// What all exchanges of a server share.
struct ApiState {
  ServedModel model;
  Engine* engine = nullptr;
  HttpMetrics metrics;
};

class CompletionExchange : public RequestListener,
                           public std::enable_shared_from_this<CompletionExchange> {
 public:
  CompletionExchange(std::shared_ptr<ApiState> state, std::string route, std::string request_id,
                     CompletionRequest request, std::shared_ptr<Responder> responder);

  // Submits; call once.
  void Start();

  void OnRefused(absl::Status why) override;
  void OnAdmitted(RequestId id) override;
  void OnPromptCached(uint32_t sequence_index, uint32_t cached_tokens) override;
  void OnPromptScores(uint32_t sequence_index, std::vector<TokenInfo> scores) override;
  void OnToken(uint32_t sequence_index, TokenInfo token) override;
  void OnSequenceEnd(uint32_t sequence_index, FinishReason reason,
                     std::optional<TokenId> stop_token, absl::Status status) override;

 private:
  using Clock = std::chrono::steady_clock;
  struct Refused {
    absl::Status why;
  };
  struct Admitted {
    RequestId id;
  };
  struct Cached {
    uint32_t index;
    uint32_t tokens;
  };
  struct Scores {
    uint32_t index;
    std::vector<TokenInfo> scores;
  };
  struct Token {
    uint32_t index;
    TokenInfo token;
  };
  struct End {
    uint32_t index;
    FinishReason reason;
    std::optional<TokenId> stop_token;
    absl::Status status;
  };
  using Event = std::variant<Refused, Admitted, Cached, Scores, Token, End>;

  // One choice and where it stands.
  struct Progress {
    Choice choice;
    ChoicePiece whole;              // of an answer that is no stream
    std::optional<TokenInfo> held;  // may be the last token
    bool echoed = false;
    bool ended = false;
    size_t received = 0;       // tokens
    size_t cached_tokens = 0;  // of the prompt
    Clock::time_point last_token{};
  };

  void Enqueue(Event event);
  void Drain();
  void Handle(Refused event);
  void Handle(Admitted event);
  void Handle(Cached event);
  void Handle(Scores event);
  void Handle(Token event);
  void Handle(End event);

  void Echo(Progress& progress);
  void Take(Progress& progress, const TokenInfo& token);
  void Emit(Progress& progress, ChoicePiece piece);
  void EndChoice(Progress& progress);
  void Succeed();
  void Fail(const ApiError& error);
  void Abandoned(AbandonReason reason);
  void Finish(int status, bool cancel);
  Usage CurrentUsage() const;
  HttpHeaders Headers() const;

  // Constant after construction.
  const std::shared_ptr<ApiState> state_;
  const std::string route_;
  const std::string request_id_;
  const CompletionRequest request_;
  const std::shared_ptr<Responder> responder_;
  const AnswerHead head_;
  const Clock::time_point start_ = Clock::now();

  // Used in posts only.
  std::deque<Progress> choices_;  // stable addresses
  size_t num_ended_ = 0;
  std::optional<RequestId> id_;
  bool streaming_ = false;
  bool finished_ = false;

  std::mutex mu_;  // between the engine's thread and the posts; guards what follows
  std::vector<Event> inbox_;
  bool posted_ = false;
  bool closed_ = false;  // nothing is wanted any more
  bool cancel_on_admission_ = false;
};

}  // namespace strait
