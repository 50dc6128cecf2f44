// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/completion_request.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <random>
#include <utility>

#include "coordinator/http/fields.h"
#include "coordinator/http/request_input.h"
#include "proto/base/limits.h"

namespace strait {
namespace {

using limits::kMaxChoices;

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

std::string Quoted(std::string_view name) { return "\"" + std::string(name) + "\""; }

uint64_t RandomSeed() {
  thread_local std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

void Unsupported(Fields& fields, std::string_view name) {
  fields.Fail(name, Quoted(name) + " is not supported; leave it out", "unsupported_parameter");
}

// Members whose presence would change the answer. What switches nothing on may stay.
void RefuseUnsupported(Fields& fields, std::initializer_list<std::string_view> names) {
  for (const std::string_view name : names) {
    const json::Value* value = fields.Any(name);
    if (value == nullptr) continue;
    if (value->is_bool() && !value->get_bool()) continue;
    if (value->is_string() && value->get_string().empty()) continue;
    if (value->is_array() && value->get_array().empty()) continue;
    if (value->is_object() && value->get_object().empty()) continue;
    Unsupported(fields, name);
  }
}

void CheckResponseFormat(Fields& fields) {
  const json::Object* format = fields.Object("response_format");
  if (format == nullptr) return;
  const json::Value* type = json::Find(*format, "type");
  if (type == nullptr || !type->is_string() || type->get_string() != "text") {
    fields.Fail("response_format", "\"response_format\" can only be {\"type\": \"text\"}",
                "unsupported_parameter");
  }
}

std::vector<std::string> ReadStops(Fields& fields, const ServedModel& model) {
  const json::Value* value = fields.Any("stop");
  if (value == nullptr) return {};
  std::vector<std::string> stops;
  const auto add = [&](const json::Value& stop) {
    if (!stop.is_string()) {
      fields.Fail("stop", "\"stop\" must be a string or an array of strings");
    } else if (stop.get_string().empty() ||
               stop.get_string().size() > limits::kMaxStopStringBytes) {
      fields.Fail("stop", "a stop string must have 1 to " +
                              std::to_string(limits::kMaxStopStringBytes) + " bytes, not " +
                              std::to_string(stop.get_string().size()));
    } else {
      stops.emplace_back(json::View(stop.get_string()));
    }
  };
  if (const json::Array* array = value->if_array()) {
    if (array->size() > limits::kMaxStopStrings) {
      fields.Fail("stop", "\"stop\" has " + std::to_string(array->size()) +
                              " strings; the limit is " + std::to_string(limits::kMaxStopStrings));
      return {};
    }
    for (const json::Value& stop : *array) add(stop);
  } else {
    add(*value);
  }
  if (!stops.empty() && !model.tokenizer) {
    fields.Fail("stop", "the model has no tokenizer: use \"stop_token_ids\" instead of \"stop\"");
  }
  return stops;
}

std::vector<std::pair<TokenId, float>> ReadLogitBias(Fields& fields, uint32_t vocab_size) {
  const json::Object* object = fields.Object("logit_bias");
  std::vector<std::pair<TokenId, float>> bias;
  if (object == nullptr) return bias;
  if (object->size() > limits::kMaxLogitBias) {
    fields.Fail("logit_bias", "\"logit_bias\" has " + std::to_string(object->size()) +
                                  " entries; the limit is " +
                                  std::to_string(limits::kMaxLogitBias));
    return bias;
  }
  Fields entries(*object);
  for (const auto& [key, value] : *object) {
    const std::string_view digits(key.data(), key.size());
    TokenId id = 0;
    const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), id);
    if (parsed.ec != std::errc() || parsed.ptr != digits.data() + digits.size() ||
        id >= vocab_size) {
      fields.Fail("logit_bias", "the keys of \"logit_bias\" must be token ids from 0 to " +
                                    std::to_string(vocab_size - 1) + ", not " + Quoted(digits));
      return bias;
    }
    bias.emplace_back(id, entries.Number(digits, 0, -kMaxLogitBiasValue, kMaxLogitBiasValue));
  }
  if (entries.error()) fields.Fail("logit_bias", "\"logit_bias\": " + entries.error()->message);
  // One order for one request, whatever the order of its text.
  std::sort(bias.begin(), bias.end());
  bias.erase(std::unique(bias.begin(), bias.end(),
                         [](const auto& a, const auto& b) { return a.first == b.first; }),
             bias.end());
  return bias;
}

uint64_t ReadSeed(Fields& fields) {
  const json::Value* value = fields.Any("seed");
  if (value == nullptr) return RandomSeed();
  if (value->is_uint64()) return value->get_uint64();
  if (const std::optional<int64_t> seed = WholeNumber(*value)) return static_cast<uint64_t>(*seed);
  fields.Fail("seed", "\"seed\" must be a 64-bit integer");
  return 0;
}

// What completions and chat have in common, into a sequence without prompt and length.
SequenceSpec ReadSampling(Fields& fields, const RequestContext& context,
                          CompletionRequest& request) {
  SequenceSpec sequence;
  sequence.seed = ReadSeed(fields);
  sequence.temperature = fields.Number("temperature", 1, 0, kMaxTemperature);
  sequence.top_p = fields.Number("top_p", 1, 0, 1, true);
  const int64_t top_k = fields.Int("top_k", -1, kMaxInt32).value_or(0);
  sequence.top_k = top_k < 0 ? 0 : static_cast<uint32_t>(top_k);  // -1 and 0: off
  sequence.min_p = fields.Number("min_p", 0, 0, 1);
  sequence.repetition_penalty =
      fields.Number("repetition_penalty", 1, 0, kMaxRepetitionPenalty, true);
  sequence.presence_penalty = fields.Number("presence_penalty", 0, -kMaxPenalty, kMaxPenalty);
  sequence.frequency_penalty = fields.Number("frequency_penalty", 0, -kMaxPenalty, kMaxPenalty);
  sequence.logit_bias = ReadLogitBias(fields, context.vocab_size);
  sequence.ignore_eos = fields.Bool("ignore_eos", false);
  sequence.min_tokens = static_cast<uint32_t>(fields.Int("min_tokens", 0, kMaxInt32).value_or(0));
  if (const json::Value* ids = fields.Any("stop_token_ids")) {
    if (!ids->is_array()) {
      fields.Fail("stop_token_ids", "\"stop_token_ids\" must be an array of token ids");
    } else if (ids->get_array().size() > limits::kMaxStopTokens) {
      fields.Fail("stop_token_ids",
                  "\"stop_token_ids\" has " + std::to_string(ids->get_array().size()) +
                      " ids; the limit is " + std::to_string(limits::kMaxStopTokens));
    } else {
      sequence.stop_token_ids =
          ReadTokenIds(fields, ids->get_array(), context.vocab_size, "stop_token_ids");
    }
  }
  request.end_ids = sequence.stop_token_ids;
  if (!sequence.ignore_eos) {
    request.end_ids.insert(request.end_ids.end(), context.eos_token_ids.begin(),
                           context.eos_token_ids.end());
  }

  sequence.cache_salt = context.default_salt;
  if (const std::optional<std::string> salt = fields.String("cache_salt")) {
    if (salt->empty() || salt->size() > limits::kMaxCacheSaltBytes) {
      fields.Fail("cache_salt", "\"cache_salt\" has " + std::to_string(salt->size()) +
                                    " bytes; it must have 1 to " +
                                    std::to_string(limits::kMaxCacheSaltBytes));
    }
    sequence.cache_salt = "salt " + *salt;
  }

  request.n = static_cast<uint32_t>(fields.Int("n", 1, kMaxChoices).value_or(1));
  request.stream = fields.Bool("stream", false);
  if (const json::Object* object = fields.Object("stream_options")) {
    Fields options(*object);
    request.include_usage = options.Bool("include_usage", false);
    if (options.error()) fields.Fail("stream_options", options.error()->message);
    if (!request.stream) {
      fields.Fail("stream_options", "\"stream_options\" can only be given with \"stream\": true");
    }
  }
  request.stops = ReadStops(fields, context.model);
  request.include_stop = fields.Bool("include_stop_str_in_output", false);
  request.skip_special_tokens = fields.Bool("skip_special_tokens", true);
  request.return_token_ids = fields.Bool("return_token_ids", false);
  request.tokens_as_ids = fields.Bool("return_tokens_as_token_ids", false);
  RefuseUnsupported(
      fields, {"prompt_logprobs", "prompt_embeds", "use_beam_search", "guided_json", "guided_regex",
               "guided_choice", "guided_grammar", "structured_outputs", "logits_processors",
               "allowed_token_ids", "bad_words", "truncate_prompt_tokens"});
  CheckResponseFormat(fields);
  return sequence;
}

// Checks a prompt and its length against the context; returns max_tokens.
uint32_t FitLength(Fields& fields, const RequestContext& context, size_t prompt_tokens,
                   std::optional<int64_t> asked, uint32_t fallback, std::string_view param,
                   std::string_view length_param) {
  const uint32_t context_tokens = context.max_positions;
  const uint64_t wanted = asked ? static_cast<uint64_t>(*asked) : 0;
  // Something must be generated, unless nothing is asked for.
  if (prompt_tokens > context_tokens ||
      (prompt_tokens == context_tokens && !(asked && wanted == 0))) {
    fields.Fail(param,
                "the prompt has " + std::to_string(prompt_tokens) +
                    " tokens, and the model's context is " + std::to_string(context_tokens) +
                    " tokens, prompt and answer together; shorten the prompt",
                "context_length_exceeded");
    return 0;
  }
  const auto room = static_cast<uint32_t>(context_tokens - prompt_tokens);
  if (wanted > room) {
    fields.Fail(length_param,
                "the prompt has " + std::to_string(prompt_tokens) + " tokens and " +
                    std::to_string(wanted) + " are asked for, and the model's context is " +
                    std::to_string(context_tokens) + " tokens; ask for at most " +
                    std::to_string(room),
                "context_length_exceeded");
    return 0;
  }
  return asked ? static_cast<uint32_t>(wanted) : std::min(fallback, room);
}

void CheckMinTokens(Fields& fields, const SequenceSpec& sequence) {
  if (sequence.min_tokens > sequence.max_tokens) {
    fields.Fail("min_tokens", "\"min_tokens\" is " + std::to_string(sequence.min_tokens) +
                                  ", more than max_tokens, " + std::to_string(sequence.max_tokens));
  }
}

void AddSequences(CompletionRequest& request, const SequenceSpec& sampling,
                  std::vector<TokenId> prompt, uint32_t max_tokens) {
  for (uint32_t i = 0; i < request.n; ++i) {
    SequenceSpec& sequence = request.spec.sequences.emplace_back(sampling);
    sequence.choice_index = i;
    sequence.max_tokens = max_tokens;
    sequence.prompt = i + 1 == request.n ? std::move(prompt) : prompt;
  }
}

struct Prompt {
  std::string text;
  std::vector<TokenId> ids;
};

// "prompt": a string, token ids, or an array of either.
std::vector<Prompt> ReadPrompts(Fields& fields, const RequestContext& context) {
  constexpr char kForms[] =
      "\"prompt\" must be a string, an array of token ids, or an array of either";
  const json::Value* value = fields.Any("prompt");
  std::vector<Prompt> prompts;
  const bool add_special = fields.Bool("add_special_tokens", true);
  const auto add_text = [&](const json::Value& text) {
    Prompt prompt;
    prompt.text = json::View(text.get_string());
    if (prompt.text.empty()) return fields.Fail("prompt", "the prompt is empty");
    prompt.ids = EncodeText(fields, context.model, prompt.text, add_special, "prompt");
    prompts.push_back(std::move(prompt));
  };
  const auto add_ids = [&](const json::Array& ids) {
    prompts.push_back({"", ReadTokenIds(fields, ids, context.vocab_size, "prompt")});
  };
  if (value == nullptr) {
    fields.Fail("prompt", "\"prompt\" is missing");
  } else if (value->is_string()) {
    add_text(*value);
  } else if (!value->is_array()) {
    fields.Fail("prompt", std::string(kForms) + ", not " + std::string(json::TypeName(*value)));
  } else if (value->get_array().empty()) {
    fields.Fail("prompt", "the prompt is empty");
  } else if (value->get_array().front().is_number()) {
    add_ids(value->get_array());
  } else if (value->get_array().size() > kMaxChoices) {
    fields.Fail("prompt", "\"prompt\" has " + std::to_string(value->get_array().size()) +
                              " prompts; the limit is " + std::to_string(kMaxChoices));
  } else {
    const json::Array& list = value->get_array();
    for (const json::Value& item : list) {
      if (!fields.ok()) break;
      if (item.kind() != list.front().kind() || !(item.is_string() || item.is_array())) {
        fields.Fail("prompt", std::string(kForms) + ", all of one kind");
      } else if (item.is_string()) {
        add_text(item);
      } else {
        add_ids(item.get_array());
      }
    }
  }
  for (const Prompt& prompt : prompts) {
    if (prompt.ids.empty()) fields.Fail("prompt", "the prompt is empty");
  }
  return prompts;
}

}  // namespace

CompletionOrError ParseCompletion(std::string_view body, const RequestContext& context) {
  std::variant<json::Object, ApiError> parsed = ParseBody(body);
  if (auto* error = std::get_if<ApiError>(&parsed)) return std::move(*error);
  Fields fields(std::get<json::Object>(parsed));
  CheckModel(fields, context.model);

  CompletionRequest request;
  SequenceSpec sampling = ReadSampling(fields, context, request);
  request.echo = fields.Bool("echo", false);
  if (const auto top = fields.Int("logprobs", 0, limits::kMaxTopLogprobs)) {
    request.logprobs = true;
    request.num_top = static_cast<uint32_t>(*top);
  }
  const std::optional<int64_t> max_tokens = fields.Int("max_tokens", 0, kMaxInt32);
  if (max_tokens == 0 && !request.echo) {
    fields.Fail("max_tokens", "\"max_tokens\" can only be 0 with \"echo\": true");
  }
  if (const auto best_of = fields.Int("best_of", 1, kMaxChoices);
      best_of && *best_of != request.n) {
    Unsupported(fields, "best_of");
  }
  RefuseUnsupported(fields, {"suffix", "tools"});
  if (!fields.ok()) return *fields.error();

  sampling.num_top = request.num_top;
  sampling.score_prompt = request.echo && (request.logprobs || max_tokens == 0);
  sampling.want_logprobs = request.logprobs && max_tokens != 0;
  std::vector<Prompt> prompts = ReadPrompts(fields, context);
  if (prompts.size() * request.n > kMaxChoices) {
    fields.Fail("n", std::to_string(prompts.size()) + " prompts with \"n\" " +
                         std::to_string(request.n) + " are " +
                         std::to_string(prompts.size() * request.n) + " choices; the limit is " +
                         std::to_string(kMaxChoices));
  }
  constexpr uint32_t kDefaultMaxTokens = 16;  // OpenAI's
  for (Prompt& prompt : prompts) {
    if (!fields.ok()) break;
    sampling.max_tokens = FitLength(fields, context, prompt.ids.size(), max_tokens,
                                    kDefaultMaxTokens, "prompt", "max_tokens");
    CheckMinTokens(fields, sampling);
    request.prompt_texts.push_back(std::move(prompt.text));
    AddSequences(request, sampling, std::move(prompt.ids), sampling.max_tokens);
  }
  if (!fields.ok()) return *fields.error();
  return request;
}

CompletionOrError ParseChat(std::string_view body, const RequestContext& context) {
  std::variant<json::Object, ApiError> parsed = ParseBody(body);
  if (auto* error = std::get_if<ApiError>(&parsed)) return std::move(*error);
  Fields fields(std::get<json::Object>(parsed));
  CheckModel(fields, context.model);

  CompletionRequest request;
  request.chat = true;
  SequenceSpec sampling = ReadSampling(fields, context, request);
  request.logprobs = fields.Bool("logprobs", false);
  if (const auto top = fields.Int("top_logprobs", 0, limits::kMaxTopLogprobs)) {
    request.num_top = static_cast<uint32_t>(*top);
    if (!request.logprobs && *top > 0) {
      fields.Fail("top_logprobs", "\"top_logprobs\" can only be given with \"logprobs\": true");
    }
  }
  RefuseUnsupported(fields,
                    {"tools", "functions", "function_call", "audio", "documents", "chat_template",
                     "continue_final_message", "echo", "best_of", "web_search_options"});
  if (const json::Value* choice = fields.Any("tool_choice");
      choice && !(choice->is_string() &&
                  (choice->get_string() == "none" || choice->get_string() == "auto"))) {
    Unsupported(fields, "tool_choice");
  }
  if (const json::Value* modalities = fields.Any("modalities");
      modalities && *modalities != json::Value(json::Array{"text"})) {
    Unsupported(fields, "modalities");
  }
  // The older name counts where the newer one is absent.
  const std::string_view length_param =
      fields.Any("max_completion_tokens") ? "max_completion_tokens" : "max_tokens";
  const std::optional<int64_t> max_tokens = fields.Int(length_param, 1, kMaxInt32);
  const bool add_special = fields.Bool("add_special_tokens", false);
  if (!fields.ok()) return *fields.error();

  const std::string text = RenderChat(fields, context.model);
  std::vector<TokenId> ids;
  if (fields.ok()) ids = EncodeText(fields, context.model, text, add_special, "messages");
  if (ids.empty()) fields.Fail("messages", "the prompt made of \"messages\" is empty");
  if (!fields.ok()) return *fields.error();

  sampling.num_top = request.num_top;
  sampling.want_logprobs = request.logprobs;
  sampling.max_tokens = FitLength(fields, context, ids.size(), max_tokens,
                                  std::numeric_limits<uint32_t>::max(), "messages", length_param);
  CheckMinTokens(fields, sampling);
  if (!fields.ok()) return *fields.error();
  request.prompt_texts.emplace_back();
  AddSequences(request, sampling, std::move(ids), sampling.max_tokens);
  return request;
}

}  // namespace strait
