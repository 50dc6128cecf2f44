// SPDX-License-Identifier: Apache-2.0
#include "worker/stage/residents.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"

namespace strait {

std::shared_ptr<Resident> Residents::Find(SequenceId id) const {
  const auto it = residents_.find(id);
  return it == residents_.end() ? nullptr : it->second;
}

void Residents::Open(const v1::OpenSequence& open, SamplingParams sampling, uint32_t kept_rows,
                     absl::Span<const ContentKey> prefix) {
  const SequenceId id{open.sequence_id()};
  auto resident = std::make_shared<Resident>();
  const auto left = left_.find(id);
  if (left != left_.end() && kept_rows > 0) {
    resident->tokens = std::move(left->second->tokens);
    STRAIT_CHECK(kept_rows <= resident->tokens.size(), "more rows are kept than are left");
    resident->tokens.resize(kept_rows);
    resident->finished = kept_rows;
    cache_.Cut(id, kept_rows);
    left_.erase(left);
  } else {
    STRAIT_CHECK(kept_rows == 0, "nothing is left of it");
    Close(id);
    cache_.Open(id, prefix);
    const auto& tokens = open.prefix_tokens().ids();
    resident->tokens.assign(tokens.begin(), tokens.end());
    resident->finished = cache_.length(id);
  }
  resident->prompt_tokens = open.prompt_tokens();
  resident->sampling = std::move(sampling);
  STRAIT_CHECK(residents_.emplace(id, std::move(resident)).second, "it is resident already");
}

void Residents::Close(SequenceId id) {
  if (residents_.erase(id) + left_.erase(id) + imports_.erase(id) > 0) cache_.Close(id);
}

void Residents::Import(SequenceId id, uint32_t rows, absl::Span<const ContentKey> prefix) {
  STRAIT_CHECK(!residents_.contains(id) && !left_.contains(id), "an import is resident");
  if (imports_.insert(id).second) cache_.Open(id, prefix);
  cache_.Grow(id, rows);
}

void Residents::LeaveImport(SequenceId id, std::vector<TokenId> tokens) {
  STRAIT_CHECK(imports_.contains(id), "it is not imported");
  if (tokens.empty()) return Close(id);
  imports_.erase(id);
  auto resident = std::make_shared<Resident>();
  resident->finished = static_cast<uint32_t>(tokens.size());
  resident->tokens = std::move(tokens);
  cache_.Cut(id, resident->finished);
  STRAIT_CHECK(left_.emplace(id, std::move(resident)).second, "it is left already");
}

void Residents::OpenImport(const v1::OpenSequence& open, SamplingParams sampling,
                           std::vector<TokenId> tokens) {
  const SequenceId id{open.sequence_id()};
  STRAIT_CHECK(imports_.erase(id) == 1, "it is not imported");
  auto resident = std::make_shared<Resident>();
  resident->finished = static_cast<uint32_t>(tokens.size());
  resident->tokens = std::move(tokens);
  resident->prompt_tokens = open.prompt_tokens();
  resident->sampling = std::move(sampling);
  cache_.Cut(id, resident->finished);
  STRAIT_CHECK(residents_.emplace(id, std::move(resident)).second, "it is resident already");
}

std::optional<uint32_t> Residents::FinishedRows(SequenceId id) const {
  if (const std::shared_ptr<Resident> resident = Find(id)) return resident->finished;
  const auto left = left_.find(id);
  if (left == left_.end()) return std::nullopt;
  return left->second->finished;
}

void Residents::Leave() {
  // By rising id, so that blocks are freed in one order.
  const std::set<SequenceId> imports(imports_.begin(), imports_.end());
  for (const SequenceId id : imports) Close(id);
  for (auto& [id, resident] : residents_) {
    // A step that holds it on is over; it must not see the cut.
    STRAIT_CHECK(resident->finished <= resident->tokens.size());
    resident->tokens.resize(resident->finished);
    cache_.Cut(id, resident->finished);
    left_.emplace(id, std::move(resident));
  }
  residents_.clear();
}

std::vector<HeldRows> Residents::left() const {
  std::vector<HeldRows> left;
  left.reserve(left_.size());
  for (const auto& [id, resident] : left_) {
    left.push_back({id, static_cast<uint32_t>(resident->tokens.size()),
                    static_cast<uint32_t>(cache_.prefix(id).size())});
  }
  std::sort(left.begin(), left.end(),
            [](const HeldRows& a, const HeldRows& b) { return a.id < b.id; });
  return left;
}

void Residents::AdoptLeft(SequenceId id, absl::Span<const TokenId> tokens,
                          absl::Span<const ContentKey> prefix,
                          std::vector<std::vector<BlockId>> own) {
  const auto rows = static_cast<uint32_t>(tokens.size());
  cache_.Adopt(id, rows, prefix, std::move(own));
  auto resident = std::make_shared<Resident>();
  resident->tokens.assign(tokens.begin(), tokens.end());
  resident->finished = rows;
  STRAIT_CHECK(left_.emplace(id, std::move(resident)).second, "it is left already");
}

absl::Status Residents::CheckIntegrity(bool computed) const {
  STRAIT_RETURN_IF_ERROR(cache_.CheckIntegrity());
  if (residents_.size() + left_.size() + imports_.size() != cache_.num_sequences()) {
    return absl::InternalError(absl::StrCat(residents_.size(), " residents, ", left_.size(),
                                            " left, ", imports_.size(), " imports, ",
                                            cache_.num_sequences(), " with page tables"));
  }
  for (const SequenceId id : imports_) {
    if (!cache_.resident(id)) {
      return absl::InternalError(absl::StrCat("import ", id.value, " has no page tables"));
    }
  }
  for (const Map* map : {&residents_, &left_}) {
    if (!computed && map == &residents_) continue;  // tokens that never came to rows
    for (const auto& [id, resident] : *map) {
      if (!cache_.resident(id) || cache_.length(id) != resident->tokens.size() ||
          resident->finished > resident->tokens.size()) {
        return absl::InternalError(absl::StrCat(
            "sequence ", id.value, " has ", resident->tokens.size(), " tokens and other tables"));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace strait
