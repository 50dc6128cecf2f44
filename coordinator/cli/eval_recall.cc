// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/eval_recall.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"

namespace strait::cli {
namespace {

void Append(TokenIds& ids, std::span<const uint32_t> more) {
  ids.insert(ids.end(), more.begin(), more.end());
}

// Word indices in random order.
std::vector<size_t> Shuffled(size_t count, Draws& draws) {
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) {
    const size_t j = draws.Below(i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  return order;
}

struct Pair {
  const TokenIds* key;
  const TokenIds* value;
  size_t size() const { return key->size() + value->size(); }
};

absl::Status DoesNotFit(uint32_t distance, size_t pair_tokens, size_t num_special,
                        uint32_t context_tokens) {
  if (distance < 2 * pair_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("--recall ", distance, ": a definition has ", pair_tokens,
                     " tokens, so the distance must be at least ", 2 * pair_tokens));
  }
  const size_t used = num_special + pair_tokens;
  return absl::InvalidArgumentError(
      absl::StrCat("--recall ", distance, " does not fit the model's context of ", context_tokens,
                   " tokens: at most ", context_tokens > used ? context_tokens - used : 0,
                   " there, with a definition before it and its question after it"));
}

}  // namespace

std::vector<TokenIds> ChooseWords(std::span<const TokenIds> words) {
  std::vector<TokenIds> single, all;
  std::set<TokenIds> seen;
  for (const TokenIds& word : words) {
    if (word.empty() || !seen.insert(word).second) continue;
    all.push_back(word);
    if (word.size() == 1) single.push_back(word);
  }
  return single.size() >= kMinRecallWords ? single : all;
}

absl::StatusOr<RecallContext> MakeRecallContext(const RecallParts& parts, uint32_t distance,
                                                uint32_t context_tokens, Draws draws) {
  const size_t mark = parts.define.size();
  if (mark != parts.ask.size()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the model's tokenizer makes ", mark, " tokens of \"\\n@\" and ", parts.ask.size(),
        " of \"\\n?\": --recall cannot keep its distances. Leave ", "--recall out for this model"));
  }
  STRAIT_CHECK(parts.words.size() >= 2);

  // Keys are the first half of the shuffled words, values are drawn from the other half.
  const std::vector<size_t> order = Shuffled(parts.words.size(), draws);
  const size_t half = order.size() / 2;
  std::vector<Pair> pairs;
  size_t definition_tokens = 0, first_tokens = 0;
  while (pairs.size() < std::min(kMaxRecallPairs, half)) {
    const Pair pair{&parts.words[order[pairs.size()]],
                    &parts.words[order[half + draws.Below(order.size() - half)]]};
    const size_t more = definition_tokens + mark + pair.size();
    if (pairs.empty()) first_tokens = more;
    if (more > distance / 2 || parts.special.size() + distance + more > context_tokens) break;
    definition_tokens = more;
    pairs.push_back(pair);
  }
  if (pairs.empty()) {
    return DoesNotFit(distance, first_tokens, parts.special.size(), context_tokens);
  }

  const size_t gap = distance - definition_tokens;
  const size_t room = context_tokens - parts.special.size() - distance - definition_tokens;
  const size_t lead = draws.Below(std::min(room, kMaxLeadTokens) + 1);
  if (parts.filler.size() < kMaxLeadTokens + gap) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--text has ", parts.filler.size(), " tokens; to fill the space between definitions and ",
        "questions, --recall ", distance, " needs ", kMaxLeadTokens + gap, ". Give longer text"));
  }
  const size_t start = draws.Below(parts.filler.size() - lead - gap + 1);
  const std::span<const uint32_t> filler = std::span(parts.filler).subspan(start, lead + gap);

  RecallContext context;
  context.ids = parts.special;
  Append(context.ids, filler.first(lead));
  for (const Pair& pair : pairs) {
    Append(context.ids, parts.define);
    Append(context.ids, *pair.key);
    Append(context.ids, *pair.value);
  }
  Append(context.ids, filler.subspan(lead));
  for (const Pair& pair : pairs) {
    Append(context.ids, parts.ask);
    Append(context.ids, *pair.key);
    context.answers.push_back(
        {static_cast<uint32_t>(context.ids.size()), static_cast<uint32_t>(pair.value->size())});
    Append(context.ids, *pair.value);
  }
  STRAIT_CHECK(context.ids.size() <= context_tokens);
  return context;
}

absl::StatusOr<std::vector<RecallContext>> MakeRecallContexts(const RecallParts& parts,
                                                              uint32_t distance,
                                                              uint32_t context_tokens,
                                                              uint32_t num_answers, uint64_t seed) {
  std::vector<RecallContext> contexts;
  for (size_t count = 0; count < num_answers; count += contexts.back().answers.size()) {
    const uint64_t key = Mix(Mix(Mix(seed) ^ distance) + contexts.size());
    STRAIT_ASSIGN_OR_RETURN(RecallContext context,
                            MakeRecallContext(parts, distance, context_tokens, Draws{key}));
    contexts.push_back(std::move(context));
  }
  return contexts;
}

}  // namespace strait::cli
