// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/client.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/sequence.h"
#include "proto/base/limits.h"
#include "proto/model/reservation.h"
#include "tests/sim/hash_model.h"

namespace strait::sim {
namespace {

std::string Show(const TokenInfo& info) {
  return absl::StrCat("token ", info.id, " at ", info.position, " with ", info.logprob);
}

bool Same(const TokenInfo& a, const TokenInfo& b) {
  return a.position == b.position && a.id == b.id && a.logprob == b.logprob && a.top == b.top;
}

}  // namespace

TokenId Clients::StemToken(uint64_t position) {
  while (stem_.size() <= position) {
    stem_.push_back(static_cast<TokenId>(world_->Random(0, scenario_->model.vocab_size - 1)));
  }
  return stem_[position];
}

SequenceSpec Clients::MakeSequence() {
  World& w = *world_;
  const ModelShape& model = scenario_->model;
  SequenceSpec spec;
  const uint64_t prompt_tokens =
      w.Chance(0.2) ? w.Pick<uint64_t>({1, 63, 64, 65}) : w.Random(1, scenario_->prompt_tokens_max);
  const uint64_t stem_tokens = w.Chance(scenario_->stem_chance) ? w.Random(0, prompt_tokens) : 0;
  for (uint64_t i = 0; i < std::min<uint64_t>(prompt_tokens, model.max_positions - 1); ++i) {
    spec.prompt.push_back(
        i < stem_tokens ? StemToken(i) : static_cast<TokenId>(w.Random(0, model.vocab_size - 1)));
  }
  if (w.Chance(0.1)) spec.cache_salt = "other";
  spec.max_tokens = static_cast<uint32_t>(std::min<uint64_t>(
      w.Random(1, scenario_->max_tokens_max), model.max_positions - spec.prompt.size()));
  if (scenario_->tokens_each > 0) {
    spec.max_tokens = scenario_->tokens_each - static_cast<uint32_t>(spec.prompt.size());
  }
  spec.ignore_eos = scenario_->tokens_each > 0 || w.Chance(0.5);
  if (w.Chance(0.3)) spec.min_tokens = static_cast<uint32_t>(w.Random(0, spec.max_tokens));
  if (w.Chance(0.3) && scenario_->tokens_each == 0)
    spec.stop_token_ids = {static_cast<TokenId>(w.Random(0, model.vocab_size - 1))};
  spec.score_prompt = w.Chance(0.3);
  if (w.Chance(0.1) && scenario_->tokens_each == 0) {
    spec.max_tokens = spec.min_tokens = 0;
  }
  spec.want_logprobs = w.Chance(0.5);
  spec.num_top = static_cast<uint32_t>(w.Pick({0, 0, 2, 20}));
  spec.seed = w.Random(0, 1000);
  if (spec.max_tokens > 0 && w.Chance(scenario_->nan_chance)) {
    spec.seed = kNanSeed + spec.prompt.size() + w.Random(0, spec.max_tokens - 1);
  }
  spec.temperature = w.Chance(0.5) ? 0.0f : 1.0f;
  spec.presence_penalty = w.Chance(0.3) ? 0.5f : 0.0f;
  return spec;
}

RequestSpec Clients::Make(RequestId* id) {
  World& w = *world_;
  *id = RequestId{++last_id_};
  Live& live = live_[*id];
  const uint64_t num_sequences = scenario_->tokens_each > 0 || w.Chance(0.8) ? 1 : w.Random(2, 4);
  for (uint64_t i = 0; i < num_sequences; ++i) {
    SequenceSpec spec = MakeSequence();
    spec.choice_index = static_cast<uint32_t>(i);
    live.spec.sequences.push_back(std::move(spec));
  }
  if (w.Chance(scenario_->deadline_chance)) live.spec.timeout_us = w.Random(1'000, 500'000);
  if (w.Chance(scenario_->bad_request_chance)) {
    live.bad = true;
    SequenceSpec& spec = live.spec.sequences.back();
    switch (w.Random(0, 4)) {
      case 0:
        spec.prompt.clear();
        break;
      case 1:
        spec.prompt.back() = scenario_->model.vocab_size;
        break;
      case 2:
        spec.max_tokens = scenario_->model.max_positions;
        break;
      case 3:
        spec.top_p = 0;
        break;
      case 4:
        live.spec.sequences.clear();
        break;
    }
  }
  live.submitted_us = w.now_us();
  ++num_live_;
  if (!live.bad) {
    for (const SequenceSpec& spec : live.spec.sequences) {
      live.streams.push_back({Expect(spec, scenario_->model)});
    }
  }
  w.Trace(absl::StrCat("submit request ", id->value, live.bad ? " (bad)" : "", " of ",
                       live.spec.sequences.size(), " sequence(s)"));
  return live.spec;
}

Clients::Live* Clients::Find(RequestId id, const char* what) {
  const auto it = live_.find(id);
  if (it == live_.end() || it->second.ended) {
    world_->Violation(absl::StrCat(what, " for request ", id.value, ", which has ended"));
    return nullptr;
  }
  return &it->second;
}

Clients::Stream* Clients::FindStream(RequestId id, uint32_t index, const char* what) {
  Live* live = Find(id, what);
  if (live == nullptr) return nullptr;
  if (!live->admitted || index >= live->streams.size() || live->streams[index].ended) {
    world_->Violation(absl::StrCat(what, " for sequence ", index, " of request ", id.value,
                                   ", which is not admitted or has ended"));
    return nullptr;
  }
  return &live->streams[index];
}

void Clients::OnCancel(RequestId id, std::optional<uint32_t> index) {
  const auto it = live_.find(id);
  if (it == live_.end()) return;
  for (uint32_t i = 0; i < it->second.streams.size(); ++i) {
    if (!index || *index == i) it->second.streams[i].cancelled = true;
  }
}

void Clients::CheckCancelled(RequestId id) {
  for (const Stream& stream : live_.at(id).streams) {
    if (!live_.at(id).ended && stream.cancelled && !stream.ended) {
      return world_->Violation(
          absl::StrCat("request ", id.value, " goes on after its cancellation"));
    }
  }
}

void Clients::CheckDeadlines(uint64_t slack_us) {
  for (const auto& [id, live] : live_) {
    if (live.ended || !live.admitted || live.spec.timeout_us == 0) continue;
    if (world_->now_us() > live.submitted_us + live.spec.timeout_us + slack_us) {
      return world_->Violation(absl::StrCat("request ", id.value, " outlives its deadline"));
    }
  }
}

void Clients::OnMessage(const RequestRefused& message, bool core_ready) {
  Live* live = Find(message.request, "refusal");
  if (live == nullptr) return;
  world_->Trace(absl::StrCat("refused ", message.request.value, ": ", message.why.ToString()));
  const std::string why = message.why.ToString();
  bool allowed = false;
  if (absl::IsInvalidArgument(message.why)) {
    uint32_t columns = 0;
    for (const SequenceSpec& spec : live->spec.sequences) {
      const auto rows = static_cast<uint32_t>(spec.prompt.size() + spec.max_tokens - 1);
      columns = std::max(columns, BlocksPerLayer(rows));
    }
    allowed = live->bad || columns > scenario_->columns_least;
  } else if (absl::IsUnavailable(message.why)) {
    allowed = !core_ready && !live->bad;
  } else if (absl::IsResourceExhausted(message.why)) {
    uint32_t sequences = 0;
    for (const auto& [id, other] : live_) {
      if (other.ended) continue;
      sequences += static_cast<uint32_t>(other.spec.sequences.size());
    }
    allowed = sequences > scenario_->options.max_waiting && !live->bad;
  }
  if (live->admitted || !allowed) {
    return world_->Violation(absl::StrCat("request ", message.request.value, " refused: ", why));
  }
  live->ended = true;
  --num_live_;
}

void Clients::OnMessage(const RequestAdmitted& message) {
  Live* live = Find(message.request, "admission");
  if (live == nullptr) return;
  if (live->bad || live->admitted) {
    return world_->Violation(absl::StrCat("request ", message.request.value, " admitted ",
                                          live->bad ? "though it is bad" : "twice"));
  }
  live->admitted = true;
}

void Clients::OnMessage(const PromptCached& message) {
  Stream* stream = FindStream(message.request, message.sequence_index, "cached tokens");
  if (stream == nullptr) return;
  const SequenceSpec& spec = live_.at(message.request).spec.sequences[message.sequence_index];
  const bool feasible = scenario_->options.prefix_cache && !stream->cached && stream->tokens == 0 &&
                        stream->scores == 0 && message.cached_tokens > 0 &&
                        message.cached_tokens % limits::kBlockTokens == 0 &&
                        message.cached_tokens < spec.prompt.size() &&
                        !(spec.score_prompt && spec.prompt.size() > 1);
  if (!feasible) {
    world_->Violation(absl::StrCat("request ", message.request.value, " with a prompt of ",
                                   spec.prompt.size(), " is told of ", message.cached_tokens,
                                   " cached tokens"));
  }
  stream->cached = true;
  num_cached_ += message.cached_tokens;
}

void Clients::OnMessage(const PromptScored& message) {
  Stream* stream = FindStream(message.request, message.sequence_index, "scores");
  if (stream == nullptr) return;
  for (const TokenInfo& score : message.scores) {
    const size_t index = stream->scores++;
    if (stream->tokens == 0 && index < stream->expected.scores.size() &&
        Same(score, stream->expected.scores[index])) {
      continue;
    }
    return world_->Violation(absl::StrCat(
        "request ", message.request.value, " score ", index, " is ", Show(score), ", expected ",
        index < stream->expected.scores.size() ? Show(stream->expected.scores[index])
                                               : std::string("none")));
  }
}

void Clients::OnMessage(const TokenEmitted& message) {
  Stream* stream = FindStream(message.request, message.sequence_index, "token");
  if (stream == nullptr) return;
  const size_t index = stream->tokens++;
  const Expected& expected = stream->expected;
  if (index < expected.tokens.size() && Same(message.token, expected.tokens[index]) &&
      stream->scores == expected.scores.size()) {
    return;
  }
  world_->Violation(absl::StrCat(
      "request ", message.request.value, " sequence ", message.sequence_index, " got ",
      Show(message.token), ", expected ",
      index < expected.tokens.size() ? Show(expected.tokens[index]) : std::string("no more")));
}

void Clients::OnMessage(const SequenceEnded& message, uint64_t no_pipeline_us,
                        uint64_t workers_lost) {
  Stream* stream = FindStream(message.request, message.sequence_index, "end");
  if (stream == nullptr) return;
  Live& live = live_.at(message.request);
  world_->Trace(absl::StrCat("end of ", message.request.value, ".", message.sequence_index,
                             ": reason ", static_cast<int>(message.reason), " ",
                             message.status.ToString()));
  const Expected& expected = stream->expected;
  const std::string text(message.status.message());
  bool allowed = false;
  switch (message.reason) {
    case FinishReason::kStop:
    case FinishReason::kLength:
      allowed = message.reason == expected.reason && message.stop_token == expected.stop_token &&
                stream->tokens == expected.tokens.size() &&
                stream->scores == expected.scores.size() && message.status.ok();
      num_finished_ += allowed;
      break;
    case FinishReason::kCancelled:
      allowed = stream->cancelled;
      break;
    case FinishReason::kError:
      if (text.find("not finite") != std::string::npos) {
        // Scores of the void result's rows are void, too.
        allowed = expected.reason == FinishReason::kError && absl::IsInternal(message.status) &&
                  stream->tokens == expected.tokens.size();
        num_nan_ += allowed;
      } else if (absl::IsDeadlineExceeded(message.status)) {
        allowed = live.spec.timeout_us > 0 &&
                  world_->now_us() >= live.submitted_us + live.spec.timeout_us;
      } else if (text.find("no pipeline serves") != std::string::npos) {
        allowed = no_pipeline_us >= scenario_->options.no_pipeline_grace_us;
      } else if (text.find("--replay-timeout") != std::string::npos) {
        allowed = many_failures_ && absl::IsUnavailable(message.status);
      } else if (text.find("workers that died") != std::string::npos) {
        allowed = (scenario_->all_faults() > kDeathsToReplayAlone ||
                   scenario_->slow_message_chance > 0) &&  // late heartbeats evict, too
                  absl::IsInternal(message.status);
      } else if (absl::IsResourceExhausted(message.status)) {
        allowed = !scenario_->equal_memory && workers_lost > 0;
      }
      break;
  }
  if (!allowed) {
    world_->Violation(absl::StrCat("request ", message.request.value, ".", message.sequence_index,
                                   " ended for reason ", static_cast<int>(message.reason), " (",
                                   message.status.ToString(), ") with ", stream->tokens, " of ",
                                   expected.tokens.size(), " tokens and ", stream->scores, " of ",
                                   expected.scores.size(), " scores"));
  }
  stream->ended = true;
  const bool last = std::all_of(live.streams.begin(), live.streams.end(),
                                [](const Stream& s) { return s.ended; });
  if (last != message.last_of_request) {
    world_->Violation(
        absl::StrCat("request ", message.request.value, ": last_of_request is wrong"));
  }
  if (!last) return;
  live.ended = true;
  --num_live_;
}

std::string Clients::Stuck() const {
  std::string out;
  for (const auto& [id, live] : live_) {
    if (live.ended) continue;
    absl::StrAppend(&out, " request ", id.value, live.admitted ? "" : " (not answered)");
    for (const Stream& stream : live.streams) {
      absl::StrAppend(&out, " ", stream.tokens, "/", stream.expected.tokens.size(),
                      stream.ended ? " ended" : "");
    }
  }
  return out;
}

}  // namespace strait::sim
