// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/completion_json.h"

#include <algorithm>
#include <string_view>
#include <unordered_set>

#include "coordinator/http/json_writer.h"

namespace strait {
namespace {

void WriteHead(JsonWriter& json, const AnswerHead& head, bool chunk) {
  std::string_view object = "text_completion";
  if (head.request.chat) object = chunk ? "chat.completion.chunk" : "chat.completion";
  json.Key("id").String(head.id);
  json.Key("object").String(object);
  json.Key("created").Int(head.created);
  json.Key("model").String(head.model.name);
}

void WriteUsage(JsonWriter& json, Usage usage) {
  json.Key("usage").BeginObject();
  json.Key("prompt_tokens").Int(usage.prompt_tokens);
  json.Key("completion_tokens").Int(usage.generated_tokens);
  json.Key("total_tokens").Int(usage.prompt_tokens + usage.generated_tokens);
  json.Key("prompt_tokens_details").BeginObject();
  json.Key("cached_tokens").Int(usage.cached_tokens);
  json.EndObject();
  json.EndObject();
}

void WriteIds(JsonWriter& json, std::string_view key, std::span<const TokenId> ids) {
  json.Key(key).BeginArray();
  for (const TokenId id : ids) json.Int(id);
  json.EndArray();
}

// {"text": logprob}: the alternatives, and the token itself if it is not among them.
void WriteTop(JsonWriter& json, const AnswerHead& head, const TokenLogprob& entry) {
  if (!entry.logprob) {
    json.Null();
    return;
  }
  std::unordered_set<std::string> names;  // two tokens may read the same
  json.BeginObject();
  const auto write = [&](TokenId id, float logprob) {
    std::string name = TokenName(head.model, id, head.request.tokens_as_ids);
    if (!names.insert(name).second) name = TokenName(head.model, id, true);
    json.Key(name).Float(logprob);
  };
  bool itself = false;
  for (size_t i = 0; i < std::min<size_t>(entry.top.size(), head.request.num_top); ++i) {
    itself = itself || entry.top[i].first == entry.id;
    write(entry.top[i].first, entry.top[i].second);
  }
  if (!itself) write(entry.id, *entry.logprob);
  json.EndObject();
}

void WriteCompletionLogprobs(JsonWriter& json, const AnswerHead& head, const ChoicePiece& piece) {
  json.BeginObject().Key("tokens").BeginArray();
  for (const TokenLogprob& entry : piece.logprobs) {
    json.String(TokenName(head.model, entry.id, head.request.tokens_as_ids));
  }
  json.EndArray().Key("token_logprobs").BeginArray();
  for (const TokenLogprob& entry : piece.logprobs) {
    entry.logprob ? json.Float(*entry.logprob) : json.Null();
  }
  json.EndArray().Key("top_logprobs").BeginArray();
  for (const TokenLogprob& entry : piece.logprobs) WriteTop(json, head, entry);
  json.EndArray().Key("text_offset").BeginArray();
  for (const TokenLogprob& entry : piece.logprobs) json.Int(entry.text_offset);
  json.EndArray().EndObject();
}

// The members of a chat log-probability that name the token and its value.
void WriteChatToken(JsonWriter& json, const AnswerHead& head, TokenId id, float logprob) {
  json.Key("token").String(TokenName(head.model, id, head.request.tokens_as_ids));
  json.Key("logprob").Float(logprob);
  json.Key("bytes").BeginArray();
  for (const unsigned char byte : TokenText(head.model, id)) json.Int(byte);
  json.EndArray();
}

void WriteChatLogprobs(JsonWriter& json, const AnswerHead& head, const ChoicePiece& piece) {
  json.BeginObject().Key("content").BeginArray();
  for (const TokenLogprob& entry : piece.logprobs) {
    json.BeginObject();
    WriteChatToken(json, head, entry.id, entry.logprob.value_or(0));
    json.Key("top_logprobs").BeginArray();
    for (size_t i = 0; i < std::min<size_t>(entry.top.size(), head.request.num_top); ++i) {
      json.BeginObject();
      WriteChatToken(json, head, entry.top[i].first, entry.top[i].second);
      json.EndObject();
    }
    json.EndArray().EndObject();
  }
  json.EndArray().EndObject();
}

// What a choice says besides its text.
void WriteRest(JsonWriter& json, const AnswerHead& head, const ChoicePiece& piece) {
  const CompletionRequest& request = head.request;
  json.Key("logprobs");
  if (piece.logprobs.empty()) {
    json.Null();
  } else if (request.chat) {
    WriteChatLogprobs(json, head, piece);
  } else {
    WriteCompletionLogprobs(json, head, piece);
  }
  json.Key("finish_reason");
  if (!piece.finish) {
    json.Null();
  } else {
    json.String(*piece.finish == FinishReason::kStop ? "stop" : "length");
  }
  if (piece.finish) {
    json.Key("stop_reason");
    if (piece.stop_token) {
      json.Int(*piece.stop_token);
    } else if (!piece.stop_string.empty()) {
      json.String(piece.stop_string);
    } else {
      json.Null();
    }
  }
  if (request.return_token_ids) {
    if (piece.first) {
      WriteIds(json, "prompt_token_ids", request.spec.sequences[piece.index].prompt);
    }
    WriteIds(json, "token_ids", piece.token_ids);
  }
}

}  // namespace

std::string WholeJson(const AnswerHead& head, std::span<const ChoicePiece> choices, Usage usage) {
  JsonWriter json;
  json.BeginObject();
  WriteHead(json, head, false);
  json.Key("choices").BeginArray();
  for (const ChoicePiece& choice : choices) {
    json.BeginObject().Key("index").Int(choice.index);
    if (head.request.chat) {
      json.Key("message").BeginObject();
      json.Key("role").String("assistant").Key("content").String(choice.text).EndObject();
    } else {
      json.Key("text").String(choice.text);
    }
    WriteRest(json, head, choice);
    json.EndObject();
  }
  json.EndArray();
  WriteUsage(json, usage);
  json.EndObject();
  return json.Take();
}

std::string ChunkJson(const AnswerHead& head, const ChoicePiece& piece) {
  JsonWriter json;
  json.BeginObject();
  WriteHead(json, head, true);
  json.Key("choices").BeginArray().BeginObject().Key("index").Int(piece.index);
  if (head.request.chat) {
    json.Key("delta").BeginObject();
    if (piece.first) json.Key("role").String("assistant");
    json.Key("content").String(piece.text).EndObject();
  } else {
    json.Key("text").String(piece.text);
  }
  WriteRest(json, head, piece);
  json.EndObject().EndArray();
  if (head.request.include_usage) json.Key("usage").Null();
  json.EndObject();
  return json.Take();
}

std::string UsageChunkJson(const AnswerHead& head, Usage usage) {
  JsonWriter json;
  json.BeginObject();
  WriteHead(json, head, true);
  json.Key("choices").BeginArray().EndArray();
  WriteUsage(json, usage);
  json.EndObject();
  return json.Take();
}

}  // namespace strait
