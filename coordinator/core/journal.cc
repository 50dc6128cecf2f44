// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/journal.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"

namespace strait {

Request* Journal::Admit(RequestId id, RequestSpec spec, uint64_t deadline_us) {
  auto owned = std::make_unique<Request>();
  Request* request = owned.get();
  request->id = id;
  request->client_id = std::move(spec.client_id);
  request->name = std::move(spec.name);
  request->deadline_us = deadline_us;
  request->num_live = static_cast<uint32_t>(spec.sequences.size());
  for (uint32_t i = 0; i < request->num_live; ++i) {
    auto sequence = std::make_unique<Sequence>();
    sequence->id = SequenceId{++last_sequence_id_};
    sequence->request = request;
    sequence->index = i;
    sequence->spec = std::move(spec.sequences[i]);
    sequence->tokens = std::move(sequence->spec.prompt);
    sequence->prompt_tokens = static_cast<uint32_t>(sequence->tokens.size());
    std::vector<TokenId>& stops = sequence->stop_ids;
    stops = sequence->spec.stop_token_ids;
    if (!sequence->spec.ignore_eos) {
      const auto& eos = context_->model.eos_token_ids;
      stops.insert(stops.end(), eos.begin(), eos.end());
    }
    std::sort(stops.begin(), stops.end());
    stops.erase(std::unique(stops.begin(), stops.end()), stops.end());
    sequences_.emplace(sequence->id, sequence.get());
    waiting_.emplace(sequence->id, sequence.get());
    request->sequences.push_back(std::move(sequence));
  }
  deadlines_.emplace(deadline_us, id);
  STRAIT_CHECK(requests_.emplace(id, std::move(owned)).second, "request ids are not reused");
  context_->Send(RequestAdmitted{id});
  return request;
}

Request* Journal::Find(RequestId id) {
  const auto it = requests_.find(id);
  return it == requests_.end() ? nullptr : it->second.get();
}

Sequence* Journal::Find(SequenceId id) {
  const auto it = sequences_.find(id);
  return it == sequences_.end() ? nullptr : it->second;
}

void Journal::Wait(Sequence* sequence) {
  STRAIT_CHECK(!sequence->resident());
  STRAIT_CHECK(waiting_.emplace(sequence->id, sequence).second, "it waits already");
}

void Journal::StopWaiting(Sequence* sequence) {
  STRAIT_CHECK(waiting_.erase(sequence->id) == 1, "it does not wait");
}

void Journal::GiveScores(Sequence* sequence, std::vector<TokenInfo> scores) {
  for (const TokenInfo& score : scores) {
    STRAIT_CHECK(score.position == sequence->scored + 1, "scores come in position order");
    sequence->scored = score.position;
  }
  sequence->blame.links_since_us = 0;
  // Of one that samples, too, the token tells: what it may be granted hangs on it.
  if (sequence->score_only()) sequence->blame.deaths = 0;
  context_->Send(PromptScored{sequence->request->id, sequence->index, std::move(scores)});
}

std::optional<Journal::Finish> Journal::GiveToken(Sequence* sequence, TokenInfo token) {
  STRAIT_CHECK(token.position == sequence->tokens.size(), "tokens come in position order");
  const TokenId id = token.id;
  sequence->tokens.push_back(id);
  sequence->blame = {};
  ++context_->stats.generated_tokens;
  context_->Send(TokenEmitted{sequence->request->id, sequence->index, std::move(token)});
  if (IsStop(*sequence, id, sequence->generated())) return Finish{FinishReason::kStop, id};
  if (sequence->generated() >= sequence->spec.max_tokens) {
    return Finish{FinishReason::kLength, std::nullopt};
  }
  return std::nullopt;
}

void Journal::End(Sequence* sequence, FinishReason reason, std::optional<TokenId> stop_token,
                  absl::Status status) {
  STRAIT_CHECK(!sequence->resident(), "a resident sequence is dropped first");
  Request* request = sequence->request;
  waiting_.erase(sequence->id);
  sequences_.erase(sequence->id);
  const bool last = --request->num_live == 0;
  ++context_->stats.requests_ended[static_cast<int>(reason)];
  context_->Send(
      SequenceEnded{request->id, sequence->index, reason, stop_token, std::move(status), last});
  request->sequences[sequence->index].reset();
  if (!last) return;
  deadlines_.erase({request->deadline_us, request->id});
  requests_.erase(RequestId(request->id));
}

void Journal::EndBegun(const absl::Status& status) {
  const std::map<SequenceId, Sequence*> sequences = sequences_;
  for (const auto& [id, sequence] : sequences) {
    if (sequence->generated() == 0 && sequence->scored == 0) continue;
    End(sequence, FinishReason::kError, std::nullopt, status);
  }
}

Request* Journal::Expired(uint64_t now_us) {
  if (deadlines_.empty() || deadlines_.begin()->first > now_us) return nullptr;
  return Find(deadlines_.begin()->second);
}

absl::Status Journal::CheckIntegrity() const {
  size_t live = 0;
  for (const auto& [id, request] : requests_) {
    uint32_t of_request = 0;
    for (const auto& sequence : request->sequences) of_request += sequence != nullptr;
    if (of_request != request->num_live || of_request == 0) {
      return absl::InternalError(absl::StrCat("request ", id.value, " has ", of_request,
                                              " sequences and counts ", request->num_live));
    }
    if (!deadlines_.contains({request->deadline_us, id})) {
      return absl::InternalError(absl::StrCat("request ", id.value, " has no deadline"));
    }
    live += of_request;
  }
  if (live != sequences_.size() || deadlines_.size() != requests_.size()) {
    return absl::InternalError(absl::StrCat("requests have ", live, " sequences, the journal has ",
                                            sequences_.size(), "; ", deadlines_.size(),
                                            " deadlines of ", requests_.size(), " requests"));
  }
  size_t resident = 0;
  for (const auto& [id, sequence] : sequences_) {
    const bool waits = waiting_.contains(id);
    resident += sequence->resident();
    if (waits == sequence->resident()) {
      return absl::InternalError(
          absl::StrCat("sequence ", id.value,
                       waits ? " waits and is resident" : " neither waits nor is resident"));
    }
    if (sequence->tokens.size() < sequence->prompt_tokens ||
        sequence->generated() > sequence->spec.max_tokens) {
      return absl::InternalError(
          absl::StrCat("sequence ", id.value, " has ", sequence->tokens.size(), " tokens"));
    }
  }
  if (waiting_.size() + resident != sequences_.size()) {
    return absl::InternalError(absl::StrCat(waiting_.size(), " wait and ", resident,
                                            " are resident, of ", sequences_.size()));
  }
  return absl::OkStatus();
}

}  // namespace strait
