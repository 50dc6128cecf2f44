// SPDX-License-Identifier: Apache-2.0
#include "coordinator/text/pre_tokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait {
namespace {

constexpr int kMaxSequenceDepth = 8;

// GPT-2's pattern, which "use_regex": true stands for.
constexpr std::string_view kByteLevelPattern =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

struct Part {
  TextRange range;
  bool is_match;
};

// The piece as matches and what lies between them.
std::vector<Part> Parts(TextRange piece, const std::vector<TextRange>& matches, bool invert) {
  std::vector<Part> parts;
  parts.reserve(2 * matches.size() + 1);
  size_t at = piece.begin;
  for (const TextRange& match : matches) {
    const TextRange range{piece.begin + match.begin, piece.begin + match.end};
    if (at != range.begin) parts.push_back({{at, range.begin}, invert});
    parts.push_back({range, !invert});
    at = range.end;
  }
  if (at != piece.end) parts.push_back({{at, piece.end}, invert});
  return parts;
}

}  // namespace

absl::StatusOr<PreTokenizer> PreTokenizer::Parse(const json::Value& spec, std::string_view what) {
  const std::string where = absl::StrCat(ToAbsl(what), ": pre_tokenizer");
  PreTokenizer result;
  if (!spec.is_null()) {
    STRAIT_ASSIGN_OR_RETURN(const json::Object* object, json::AsObject(spec, where));
    STRAIT_RETURN_IF_ERROR(result.Add(*object, where, 0));
  }
  if (!result.byte_level_) {
    return absl::UnimplementedError(
        absl::StrCat(where, " has no ByteLevel step; only byte-level vocabularies are supported"));
  }
  return result;
}

absl::Status PreTokenizer::Add(const json::Object& spec, const std::string& what, int depth) {
  STRAIT_ASSIGN_OR_RETURN(const std::string type, json::GetString(spec, "type", what));
  if (byte_level_) {
    return absl::UnimplementedError(absl::StrCat(what, ": \"", type, "\" after ByteLevel"));
  }
  if (steps_.size() >= kMaxPreTokenizerSteps || depth > kMaxSequenceDepth) {
    return absl::ResourceExhaustedError(
        absl::StrCat(what, ": more than ", kMaxPreTokenizerSteps, " steps"));
  }
  if (type == "Sequence") {
    STRAIT_ASSIGN_OR_RETURN(const json::Array* list, json::GetArray(spec, "pretokenizers", what));
    for (size_t i = 0; i < list->size(); ++i) {
      const std::string where = absl::StrCat(what, "[", i, "]");
      STRAIT_ASSIGN_OR_RETURN(const json::Object* step, json::AsObject((*list)[i], where));
      STRAIT_RETURN_IF_ERROR(Add(*step, where, depth + 1));
    }
    return absl::OkStatus();
  }
  if (type == "Split") return AddSplit(spec, what);
  if (type == "ByteLevel") return AddByteLevel(spec, what);
  if (type == "Digits") {
    STRAIT_ASSIGN_OR_RETURN(const bool individual,
                            json::GetBoolOr(spec, "individual_digits", false, what));
    STRAIT_ASSIGN_OR_RETURN(Regex digit, Regex::CompileDigit());
    steps_.push_back(
        {std::move(digit), individual ? Behavior::kIsolated : Behavior::kContiguous, false});
    return absl::OkStatus();
  }
  return absl::UnimplementedError(absl::StrCat(
      what, ": type \"", type, "\" is not supported (Sequence, Split, Digits, ByteLevel are)"));
}

absl::Status PreTokenizer::AddSplit(const json::Object& spec, const std::string& what) {
  static constexpr std::pair<std::string_view, Behavior> kBehaviors[] = {
      {"Removed", Behavior::kRemoved},
      {"Isolated", Behavior::kIsolated},
      {"MergedWithPrevious", Behavior::kMergedWithPrevious},
      {"MergedWithNext", Behavior::kMergedWithNext},
      {"Contiguous", Behavior::kContiguous},
  };
  STRAIT_ASSIGN_OR_RETURN(const std::string name, json::GetString(spec, "behavior", what));
  const auto* behavior = std::find_if(std::begin(kBehaviors), std::end(kBehaviors),
                                      [&](const auto& known) { return known.first == name; });
  if (behavior == std::end(kBehaviors)) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": unknown behavior \"", name, "\""));
  }
  STRAIT_ASSIGN_OR_RETURN(const bool invert, json::GetBoolOr(spec, "invert", false, what));
  STRAIT_ASSIGN_OR_RETURN(const json::Object* pattern, json::GetObject(spec, "pattern", what));
  const bool is_regex = json::Find(*pattern, "Regex") != nullptr;
  STRAIT_ASSIGN_OR_RETURN(
      const std::string text,
      json::GetString(*pattern, is_regex ? "Regex" : "String", absl::StrCat(what, ": pattern")));
  absl::StatusOr<Regex> regex = is_regex ? Regex::Compile(text) : Regex::CompileLiteral(text);
  if (!regex.ok()) {
    return absl::Status(regex.status().code(), absl::StrCat(what, ": ", regex.status().message()));
  }
  steps_.push_back({*std::move(regex), behavior->second, invert});
  return absl::OkStatus();
}

absl::Status PreTokenizer::AddByteLevel(const json::Object& spec, const std::string& what) {
  // trim_offsets is about offsets, which we do not report.
  STRAIT_ASSIGN_OR_RETURN(add_prefix_space_, json::GetBoolOr(spec, "add_prefix_space", true, what));
  STRAIT_ASSIGN_OR_RETURN(const bool use_regex, json::GetBoolOr(spec, "use_regex", true, what));
  if (add_prefix_space_ && !steps_.empty()) {
    return absl::UnimplementedError(
        absl::StrCat(what, ": add_prefix_space after other steps is not supported"));
  }
  if (use_regex) {
    STRAIT_ASSIGN_OR_RETURN(Regex regex, Regex::Compile(kByteLevelPattern));
    steps_.push_back({std::move(regex), Behavior::kIsolated, false});
  }
  byte_level_ = true;
  return absl::OkStatus();
}

void PreTokenizer::Cut(const Step& step, TextRange piece, const std::vector<TextRange>& matches,
                       std::vector<TextRange>* out) {
  const auto emit = [out](TextRange range) {
    if (range.begin != range.end) out->push_back(range);
  };
  // What DeepSeek's files do everywhere, without the detour.
  if (step.behavior == Behavior::kIsolated) {
    size_t at = piece.begin;
    for (const TextRange& match : matches) {
      emit({at, piece.begin + match.begin});
      emit({piece.begin + match.begin, piece.begin + match.end});
      at = piece.begin + match.end;
    }
    emit({at, piece.end});
    return;
  }
  std::vector<Part> parts = Parts(piece, matches, step.invert);
  const bool backwards = step.behavior == Behavior::kMergedWithNext;
  if (backwards) std::reverse(parts.begin(), parts.end());
  std::vector<TextRange> merged;
  bool previous_match = false;
  for (const Part& part : parts) {
    bool join = false;
    switch (step.behavior) {
      case Behavior::kRemoved:
        if (part.is_match) continue;
        break;
      case Behavior::kContiguous:
        join = part.is_match == previous_match;
        break;
      case Behavior::kMergedWithPrevious:
      case Behavior::kMergedWithNext:
        join = part.is_match && !previous_match;
        break;
      case Behavior::kIsolated:
        break;
    }
    previous_match = part.is_match;
    if (!join || merged.empty()) {
      merged.push_back(part.range);
    } else if (backwards) {
      merged.back().begin = part.range.begin;
    } else {
      merged.back().end = part.range.end;
    }
  }
  if (backwards) std::reverse(merged.begin(), merged.end());
  for (const TextRange& range : merged) emit(range);
}

absl::Status PreTokenizer::Split(std::string_view text, bool newer_unicode,
                                 PreTokenizerScratch* scratch) const {
  scratch->pieces.clear();
  if (!text.empty()) scratch->pieces.push_back({0, text.size()});
  for (const Step& step : steps_) {
    scratch->next_pieces.clear();
    for (const TextRange& piece : scratch->pieces) {
      scratch->matches.clear();
      STRAIT_RETURN_IF_ERROR(step.regex.FindAll(text.substr(piece.begin, piece.end - piece.begin),
                                                newer_unicode, &scratch->regex, &scratch->matches));
      if (scratch->matches.empty() && !step.invert) {
        scratch->next_pieces.push_back(piece);
        continue;
      }
      Cut(step, piece, scratch->matches, &scratch->next_pieces);
    }
    std::swap(scratch->pieces, scratch->next_pieces);
  }
  return absl::OkStatus();
}

}  // namespace strait
