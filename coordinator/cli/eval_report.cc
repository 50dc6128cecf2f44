// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/eval_report.h"

#include <algorithm>
#include <numbers>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/wire/version.h"

namespace strait::cli {
namespace {

json::Object ToJson(const Estimate& estimate) {
  json::Object out = {{"value", estimate.value}};
  if (estimate.has_interval) {
    out["low"] = estimate.low;
    out["high"] = estimate.high;
  } else {
    out["low"] = nullptr;
    out["high"] = nullptr;
  }
  return out;
}

std::vector<double> Losses(const TargetResult& target) {
  std::vector<double> losses;
  for (const WindowResult& window : target.windows) losses.push_back(window.loss);
  return losses;
}

std::vector<double> BucketLosses(const TargetResult& target, size_t bucket) {
  std::vector<double> losses;
  for (const WindowResult& window : target.windows) losses.push_back(window.bucket_loss[bucket]);
  return losses;
}

Estimate BitsPerByte(const TargetResult& target) {
  std::vector<double> bits, bytes;
  for (const WindowResult& window : target.windows) {
    bits.push_back(window.loss * static_cast<double>(window.num_scored) / std::numbers::ln2);
    bytes.push_back(window.num_bytes);
  }
  const double all = std::accumulate(bytes.begin(), bytes.end(), 0.0);
  return all > 0 ? RatioOf(bits, bytes) : Estimate{};
}

json::Object PerplexityJson(const TargetResult& target) {
  json::Object out;
  const std::vector<double> losses = Losses(target);
  const Estimate loss = MeanOf(losses);
  size_t tokens = 0;
  double bytes = 0;
  for (const WindowResult& window : target.windows) {
    tokens += window.num_scored;
    bytes += window.num_bytes;
  }
  out["windows"] = target.windows.size();
  out["tokens"] = tokens;
  out["bytes"] = bytes;
  out["nll"] = ToJson(loss);
  out["perplexity"] = ToJson(Exponential(loss));
  out["bits_per_byte"] = ToJson(BitsPerByte(target));
  json::Array buckets;
  for (size_t i = 0; i < target.buckets.size(); ++i) {
    const std::vector<double> some = BucketLosses(target, i);
    const Estimate mean = MeanOf(some);
    buckets.push_back(json::Object{{"begin", target.buckets[i].begin},
                                   {"end", target.buckets[i].end},
                                   {"nll", ToJson(mean)},
                                   {"perplexity", ToJson(Exponential(mean))}});
  }
  out["buckets"] = std::move(buckets);
  if (target.buckets.size() > 1) {
    const std::vector<double> last = BucketLosses(target, target.buckets.size() - 1);
    const std::vector<double> first = BucketLosses(target, 0);
    out["last_minus_first"] = ToJson(PairedDifference(last, first));
  }
  out["window_nll"] = json::Array(losses.begin(), losses.end());
  return out;
}

json::Object RecallJson(const RecallResult& recall) {
  const size_t right = static_cast<size_t>(std::count(recall.right.begin(), recall.right.end(), 1));
  return {{"distance", recall.distance},
          {"contexts", recall.contexts.size()},
          {"answers", recall.right.size()},
          {"right", right},
          {"accuracy", ToJson(ShareOf(right, recall.right.size()))}};
}

bool SameWindows(const TargetResult& a, const TargetResult& b) {
  return a.buckets == b.buckets &&
         std::equal(a.windows.begin(), a.windows.end(), b.windows.begin(), b.windows.end(),
                    [](const WindowResult& x, const WindowResult& y) { return x.ids == y.ids; });
}

bool SameContexts(const RecallResult& a, const RecallResult& b) {
  return a.distance == b.distance &&
         std::equal(a.contexts.begin(), a.contexts.end(), b.contexts.begin(), b.contexts.end(),
                    [](const RecallContext& x, const RecallContext& y) { return x.ids == y.ids; });
}

json::Object DifferenceJson(std::span<const double> second, std::span<const double> first) {
  return ToJson(PairedDifference(second, first));
}

// ---- Tables ----

const json::Object& At(const json::Object& object, const char* key) {
  return object.at(key).as_object();
}

std::string Digits(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", digits, value);
  return text;
}

std::string Value(const json::Object& estimate, int digits) {
  return Digits(estimate.at("value").to_number<double>(), digits);
}

std::string Interval(const json::Object& estimate, int digits) {
  if (estimate.at("low").is_null()) return "-";
  return absl::StrCat(Digits(estimate.at("low").to_number<double>(), digits), " … ",
                      Digits(estimate.at("high").to_number<double>(), digits));
}

std::string Plain(const json::Value& value) {
  if (value.is_string()) return std::string(json::View(value.get_string()));
  return boost::json::serialize(value);
}

std::string BucketName(const json::Object& bucket) {
  return absl::StrCat(Plain(bucket.at("begin")), "-", Plain(bucket.at("end")));
}

using Rows = std::vector<std::vector<std::string>>;

void PerplexityTable(const json::Object& figures, std::string* text) {
  Rows rows = {{"positions", "perplexity", "95 % interval", "log-loss", "95 % interval"}};
  const auto add = [&](const std::string& name, const json::Object& of) {
    const json::Object& perplexity = At(of, "perplexity");
    const int digits = perplexity.at("value").to_number<double>() < 100 ? 3 : 1;
    rows.push_back({name, Value(perplexity, digits), Interval(perplexity, digits),
                    Value(At(of, "nll"), 4), Interval(At(of, "nll"), 4)});
  };
  for (const json::Value& bucket : figures.at("buckets").as_array()) {
    add(BucketName(bucket.as_object()), bucket.as_object());
  }
  add("all", figures);
  *text += FormatTable(rows);
  if (figures.contains("last_minus_first")) {
    const json::Object& difference = At(figures, "last_minus_first");
    absl::StrAppend(text, "log-loss, last less first positions: ", Value(difference, 4), " (",
                    Interval(difference, 4), ", paired by window)\n");
  }
  const json::Object& bits = At(figures, "bits_per_byte");
  absl::StrAppend(text, "bits per byte: ", Value(bits, 4), " (", Interval(bits, 4), ")\n");
}

void TargetTables(const json::Object& target, std::string* text) {
  const json::Object& figures = At(target, "text");
  absl::StrAppend(text, Plain(target.at("name")), ", model ", Plain(target.at("model")), ": ",
                  Plain(figures.at("windows")), " windows of ", Plain(target.at("window")),
                  " tokens, ", Plain(figures.at("tokens")), " tokens scored\n\n");
  PerplexityTable(figures, text);
  const json::Array& recall = target.at("recall").as_array();
  if (!recall.empty()) {
    Rows rows = {{"recall at", "answers", "right", "accuracy %", "95 % interval"}};
    for (const json::Value& entry : recall) {
      const json::Object& of = entry.as_object();
      const auto percent = [](double share) { return Digits(100 * share, 2); };
      const json::Object& share = At(of, "accuracy");
      rows.push_back({Plain(of.at("distance")), Plain(of.at("answers")), Plain(of.at("right")),
                      percent(share.at("value").to_number<double>()),
                      absl::StrCat(percent(share.at("low").to_number<double>()), " … ",
                                   percent(share.at("high").to_number<double>()))});
    }
    absl::StrAppend(text, "\n", FormatTable(rows));
  }
  const json::Object& rates = At(target, "rates");
  absl::StrAppend(text, "\nscored tokens/s: ",
                  FormatNumber(rates.at("scored_tokens_per_s").to_number<double>()),
                  "; decoded tokens/s, one sequence: ",
                  FormatNumber(rates.at("decode_tokens_per_s").to_number<double>()), "\n");
  if (target.at("cache").is_null()) {
    absl::StrAppend(text, "cache bytes per token: ", Plain(target.at("cache_missing")), "\n");
    return;
  }
  const json::Object& cache = At(target, "cache");
  const json::Array& layers = cache.at("bytes_per_token_by_layer").as_array();
  absl::StrAppend(text, "cache bytes per token: ",
                  Digits(cache.at("bytes_per_token").to_number<double>(), 0), "; by layer:");
  for (size_t i = 0; i < layers.size();) {  // runs of equal layers together
    size_t end = i + 1;
    while (end < layers.size() && layers[end] == layers[i]) ++end;
    absl::StrAppend(text, i > 0 ? "," : "", " ", i,
                    end - i > 1 ? absl::StrCat("-", end - 1) : std::string(), ": ",
                    Digits(layers[i].to_number<double>(), 0));
    i = end;
  }
  *text += "\n";
}

void ComparisonTables(const json::Object& comparison, std::string* text) {
  absl::StrAppend(text, "\nsecond less first (", Plain(comparison.at("first")), " → ",
                  Plain(comparison.at("second")), ")\n");
  if (comparison.contains("note")) {
    absl::StrAppend(text, "note: ", Plain(comparison.at("note")), "\n");
  }
  Rows rows = {{"what", "difference", "95 % interval"}};
  const auto add = [&](const std::string& what, const json::Object& estimate) {
    rows.push_back({what, Value(estimate, 4), Interval(estimate, 4)});
  };
  if (comparison.contains("nll")) {
    for (const json::Value& bucket : comparison.at("buckets").as_array()) {
      add(absl::StrCat("log-loss ", BucketName(bucket.as_object())), At(bucket.as_object(), "nll"));
    }
    add("log-loss all", At(comparison, "nll"));
  }
  add("bits per byte", At(comparison, "bits_per_byte"));
  if (comparison.contains("recall")) {
    for (const json::Value& entry : comparison.at("recall").as_array()) {
      add(absl::StrCat("recall at ", Plain(entry.as_object().at("distance"))),
          At(entry.as_object(), "accuracy"));
    }
  }
  absl::StrAppend(text, "\n", FormatTable(rows));
}

}  // namespace

json::Object TargetJson(const TargetResult& target) {
  json::Object out;
  out["name"] = target.name;
  out["model"] = target.model;
  out["max_model_len"] = target.max_model_len;
  out["window"] = target.window;
  out["special_tokens"] = target.num_special;
  out["text"] = PerplexityJson(target);
  json::Array recall;
  for (const RecallResult& one : target.recall) recall.push_back(RecallJson(one));
  out["recall"] = std::move(recall);
  out["rates"] = json::Object{
      {"scored_tokens", target.scored_tokens},
      {"score_s", target.score_s},
      {"scored_tokens_per_s",
       target.score_s > 0 ? static_cast<double>(target.scored_tokens) / target.score_s : 0},
      {"decode_tokens", target.decode_tokens},
      {"decode_tokens_per_s", target.decode_tokens_per_s}};
  const std::vector<double>& layers = target.cache_bytes_per_token;
  if (layers.empty()) {
    out["cache"] = nullptr;
    out["cache_missing"] = target.cache_missing;
  } else {
    out["cache"] =
        json::Object{{"bytes_per_token", std::accumulate(layers.begin(), layers.end(), 0.0)},
                     {"bytes_per_token_by_layer", json::Array(layers.begin(), layers.end())}};
  }
  return out;
}

json::Object ComparisonJson(const TargetResult& first, const TargetResult& second) {
  json::Object out;
  out["first"] = first.name;
  out["second"] = second.name;
  const bool same = SameWindows(first, second);
  out["same_tokens"] = same;
  if (!same) {
    out["note"] =
        "the two tokenize the text differently, so that log-loss and recall cannot be compared; "
        "bits per byte are, each on its own windows (unpaired)";
    out["bits_per_byte"] = ToJson(IndependentDifference(BitsPerByte(second), BitsPerByte(first)));
    return out;
  }
  out["nll"] = DifferenceJson(Losses(second), Losses(first));
  json::Array buckets;
  for (size_t i = 0; i < first.buckets.size(); ++i) {
    buckets.push_back(
        json::Object{{"begin", first.buckets[i].begin},
                     {"end", first.buckets[i].end},
                     {"nll", DifferenceJson(BucketLosses(second, i), BucketLosses(first, i))}});
  }
  out["buckets"] = std::move(buckets);
  // The same bytes on both sides: a difference of bits over bytes.
  std::vector<double> bits, bytes;
  for (size_t i = 0; i < first.windows.size(); ++i) {
    const WindowResult &a = first.windows[i], &b = second.windows[i];
    bits.push_back((b.loss - a.loss) * static_cast<double>(a.num_scored) / std::numbers::ln2);
    bytes.push_back(a.num_bytes);
  }
  const double all = std::accumulate(bytes.begin(), bytes.end(), 0.0);
  out["bits_per_byte"] = ToJson(all > 0 ? RatioOf(bits, bytes) : Estimate{});
  json::Array recall;
  for (size_t i = 0; i < std::min(first.recall.size(), second.recall.size()); ++i) {
    const RecallResult &a = first.recall[i], &b = second.recall[i];
    if (!SameContexts(a, b)) {
      out["note"] = "the two tokenize recall's words differently, so that recall is not compared";
      continue;
    }
    const std::vector<double> right_a(a.right.begin(), a.right.end());
    const std::vector<double> right_b(b.right.begin(), b.right.end());
    recall.push_back(
        json::Object{{"distance", a.distance}, {"accuracy", DifferenceJson(right_b, right_a)}});
  }
  out["recall"] = std::move(recall);
  return out;
}

json::Object ReportJson(const EvalOptions& options, const TextFile& text,
                        const std::vector<TargetResult>& targets) {
  json::Object out;
  out["program"] = absl::StrCat("strait eval ", kVersion);
  out["text"] = json::Object{{"path", text.path},
                             {"form", text.is_lines ? "json lines" : "plain"},
                             {"documents", text.documents.size()},
                             {"bytes", text.num_bytes}};
  out["seed"] = options.seed;
  out["concurrency"] = options.concurrency;
  json::Array all;
  for (const TargetResult& target : targets) all.push_back(TargetJson(target));
  out["targets"] = std::move(all);
  if (targets.size() == 2) out["comparison"] = ComparisonJson(targets[0], targets[1]);
  return out;
}

std::string ReportTables(const json::Object& report) {
  std::string text;
  for (const json::Value& target : report.at("targets").as_array()) {
    if (!text.empty()) text += "\n";
    TargetTables(target.as_object(), &text);
  }
  if (report.contains("comparison")) ComparisonTables(At(report, "comparison"), &text);
  return text;
}

}  // namespace strait::cli
