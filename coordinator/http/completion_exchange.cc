// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/completion_exchange.h"

#include <algorithm>
#include <utility>

#include "coordinator/http/api_error.h"
#include "proto/base/check.h"

namespace strait {
namespace {

constexpr char kPing[] = ": ping\n\n";
constexpr char kDone[] = "data: [DONE]\n\n";

double Seconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration<double>(time).count();
}

int64_t UnixTime() {
  return std::chrono::duration_cast<std::chrono::seconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

}  // namespace

CompletionExchange::CompletionExchange(std::shared_ptr<ApiState> state, std::string route,
                                       std::string request_id, CompletionRequest request,
                                       std::shared_ptr<Responder> responder)
    : state_(std::move(state)),
      route_(std::move(route)),
      request_id_(std::move(request_id)),
      request_(std::move(request)),
      responder_(std::move(responder)),
      head_{request_.spec.name, UnixTime(), state_->model, request_} {
  for (uint32_t i = 0; i < request_.spec.sequences.size(); ++i) {
    Progress& progress = choices_.emplace_back(Progress{Choice(state_->model, request_, i)});
    progress.whole.index = i;
    progress.whole.first = true;
  }
}

void CompletionExchange::Start() {
  state_->metrics.AddInFlight(1);
  responder_->OnAbandon(
      [self = shared_from_this()](AbandonReason reason) { self->Abandoned(reason); });
  {
    std::lock_guard lock(mu_);
    if (closed_) return;  // the client went away while its request was read
  }
  state_->engine->Submit(request_.spec, shared_from_this());
}

// ---- The engine's thread ----

void CompletionExchange::OnRefused(absl::Status why) { Enqueue(Refused{std::move(why)}); }
void CompletionExchange::OnAdmitted(RequestId id) { Enqueue(Admitted{id}); }
void CompletionExchange::OnPromptCached(uint32_t index, uint32_t cached_tokens) {
  Enqueue(Cached{index, cached_tokens});
}
void CompletionExchange::OnPromptScores(uint32_t index, std::vector<TokenInfo> scores) {
  Enqueue(Scores{index, std::move(scores)});
}
void CompletionExchange::OnToken(uint32_t index, TokenInfo token) {
  Enqueue(Token{index, std::move(token)});
}
void CompletionExchange::OnSequenceEnd(uint32_t index, FinishReason reason,
                                       std::optional<TokenId> stop_token, absl::Status status) {
  Enqueue(End{index, reason, stop_token, std::move(status)});
}

void CompletionExchange::Enqueue(Event event) {
  std::optional<RequestId> unwanted;
  {
    std::lock_guard lock(mu_);
    if (!closed_) {
      inbox_.push_back(std::move(event));
      // Under the lock: after closing, no post is made, so the server may end its threads.
      if (!std::exchange(posted_, true))
        responder_->Post([self = shared_from_this()] { self->Drain(); });
      return;
    }
    const Admitted* admitted = std::get_if<Admitted>(&event);
    if (admitted && cancel_on_admission_) unwanted = admitted->id;
  }
  if (unwanted) state_->engine->Cancel(*unwanted, std::nullopt);
}

// ---- The Responder's posts ----

void CompletionExchange::Drain() {
  std::vector<Event> events;
  {
    std::lock_guard lock(mu_);
    events.swap(inbox_);
    posted_ = false;
  }
  for (Event& event : events) {
    if (finished_) return;
    std::visit([this](auto& e) { Handle(std::move(e)); }, event);
  }
}

void CompletionExchange::Handle(Refused event) { Fail(ToApiError(event.why)); }

void CompletionExchange::Handle(Admitted event) {
  id_ = event.id;
  if (!request_.stream) return;
  streaming_ = true;
  HttpResponse head;
  head.content_type = "text/event-stream";
  head.headers = Headers();
  head.headers.emplace_back("Cache-Control", "no-cache");
  head.headers.emplace_back("X-Accel-Buffering", "no");
  responder_->StartStream(std::move(head), kPing);
}

void CompletionExchange::Handle(Cached event) {
  choices_[event.index].cached_tokens = event.tokens;
}

void CompletionExchange::Handle(Scores event) {
  STRAIT_CHECK(event.index < choices_.size());
  choices_[event.index].choice.AddScores(std::move(event.scores));
}

void CompletionExchange::Handle(Token event) {
  STRAIT_CHECK(event.index < choices_.size());
  Progress& progress = choices_[event.index];
  if (progress.ended) return;
  const Clock::time_point now = Clock::now();
  if (progress.received++ == 0) {
    state_->metrics.ObserveFirstToken(Seconds(now - start_));
  } else {
    state_->metrics.ObserveNextToken(Seconds(now - progress.last_token));
  }
  progress.last_token = now;
  if (progress.held) {
    Take(progress, *std::exchange(progress.held, std::nullopt));
    if (progress.ended || finished_) return;
  }
  const auto& ends = request_.end_ids;
  if (progress.received >= progress.choice.spec().max_tokens ||
      std::find(ends.begin(), ends.end(), event.token.id) != ends.end()) {
    progress.held = std::move(event.token);
  } else {
    Take(progress, event.token);
  }
}

void CompletionExchange::Handle(End event) {
  STRAIT_CHECK(event.index < choices_.size());
  Progress& progress = choices_[event.index];
  if (progress.ended) return;  // by a stop string; this is the engine's echo of our Cancel
  if (event.reason == FinishReason::kError || event.reason == FinishReason::kCancelled ||
      !event.status.ok()) {
    absl::Status why = event.status;
    if (why.ok() && event.reason == FinishReason::kError)
      why = absl::InternalError("generation failed");
    if (why.ok()) why = absl::UnavailableError("the server has cancelled the request");
    return Fail(ToApiError(why));
  }
  Echo(progress);
  ChoicePiece last;
  if (progress.held) {
    const TokenInfo token = *std::exchange(progress.held, std::nullopt);
    const bool hidden = event.stop_token == token.id && !request_.include_stop;
    last = progress.choice.Token(token, hidden);
  } else {
    last = progress.choice.Nothing();
  }
  if (!progress.choice.stopped()) {
    last.text += progress.choice.Flush();
    last.finish = event.reason;
    // What the model itself ends with is no stop that the client asked for.
    const auto& asked = progress.choice.spec().stop_token_ids;
    if (event.stop_token &&
        std::find(asked.begin(), asked.end(), *event.stop_token) != asked.end()) {
      last.stop_token = event.stop_token;
    }
  }
  Emit(progress, std::move(last));
  EndChoice(progress);
}

void CompletionExchange::Echo(Progress& progress) {
  if (!request_.echo || std::exchange(progress.echoed, true)) return;
  Emit(progress, progress.choice.Prompt());
}

void CompletionExchange::Take(Progress& progress, const TokenInfo& token) {
  Echo(progress);
  Emit(progress, progress.choice.Token(token, false));
  if (!progress.choice.stopped() || finished_) return;
  EndChoice(progress);
  // The engine knows no text: it would go on.
  if (!finished_ && id_) state_->engine->Cancel(*id_, progress.whole.index);
}

void CompletionExchange::Emit(Progress& progress, ChoicePiece piece) {
  if (!request_.stream) return progress.whole.Append(std::move(piece));
  // The position names the event; of several choices, the index goes before it.
  std::string event = "id: ";
  if (choices_.size() > 1) event += std::to_string(piece.index) + ":";
  event += std::to_string(piece.position) + "\ndata: " + ChunkJson(head_, piece) + "\n\n";
  responder_->Write(std::move(event));
}

void CompletionExchange::EndChoice(Progress& progress) {
  progress.ended = true;
  if (++num_ended_ == choices_.size()) Succeed();
}

Usage CompletionExchange::CurrentUsage() const {
  Usage usage;
  for (size_t i = 0; i < choices_.size(); ++i) {
    // The choices of one prompt share it.
    if (i % request_.n == 0) {
      usage.prompt_tokens += choices_[i].choice.spec().prompt.size();
      usage.cached_tokens += choices_[i].cached_tokens;
    }
    usage.generated_tokens += choices_[i].choice.num_generated();
  }
  return usage;
}

HttpHeaders CompletionExchange::Headers() const { return {{"X-Request-Id", request_id_}}; }

void CompletionExchange::Succeed() {
  // A choice that a stop string ended still runs in the engine.
  const bool running = std::any_of(choices_.begin(), choices_.end(),
                                   [](const Progress& p) { return p.choice.stopped(); });
  if (streaming_) {
    std::string end;
    if (request_.include_usage) end = "data: " + UsageChunkJson(head_, CurrentUsage()) + "\n\n";
    responder_->Write(end + kDone);
    responder_->EndStream();
  } else {
    HttpResponse response;
    response.headers = Headers();
    std::vector<ChoicePiece> pieces;
    for (Progress& progress : choices_) pieces.push_back(std::move(progress.whole));
    response.body = WholeJson(head_, pieces, CurrentUsage());
    responder_->Send(std::move(response));
  }
  Finish(200, running);
}

void CompletionExchange::Fail(const ApiError& error) {
  if (streaming_) {
    responder_->Write("data: " + ErrorJson(error) + "\n\n");
    responder_->EndStream();
  } else {
    HttpResponse response = ErrorResponse(error);
    for (auto& header : Headers()) response.headers.push_back(std::move(header));
    responder_->Send(std::move(response));
  }
  Finish(error.status, true);
}

void CompletionExchange::Abandoned(AbandonReason reason) {
  if (finished_) return;
  if (reason == AbandonReason::kServerStopping) {
    return Fail({503, "the server is stopping", "", "stopping"});
  }
  constexpr int kClientGoneStatus = 499;  // for metrics; nobody receives it
  Finish(kClientGoneStatus, true);
}

void CompletionExchange::Finish(int status, bool cancel) {
  // Writing to a client that is too slow abandons the exchange under the writer's feet.
  if (std::exchange(finished_, true)) return;
  {
    std::lock_guard lock(mu_);
    closed_ = true;
    cancel_on_admission_ = cancel;
    // An admission may wait unread.
    for (const Event& event : inbox_) {
      if (const Admitted* admitted = std::get_if<Admitted>(&event)) id_ = admitted->id;
    }
    inbox_.clear();
  }
  if (cancel && id_) state_->engine->Cancel(*id_, std::nullopt);
  const Usage usage = CurrentUsage();
  state_->metrics.CountAnswer(route_, status);
  state_->metrics.ObserveRequest(Seconds(Clock::now() - start_), usage.prompt_tokens,
                                 usage.generated_tokens);
  state_->metrics.AddInFlight(-1);
}

}  // namespace strait
