// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/verb_request.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>

#include "coordinator/http/fields.h"
#include "coordinator/http/request_input.h"
#include "proto/base/limits.h"
#include "proto/base/text.h"

namespace strait {
namespace {

constexpr size_t kMaxShownBytes = 64;  // of a name that nobody knows

std::string Quoted(std::string_view name) { return "\"" + std::string(name) + "\""; }

void RefuseUnknown(Fields& fields, const json::Object& object,
                   std::initializer_list<std::string_view> known) {
  for (const auto& [key, value] : object) {
    const std::string_view name(key.data(), key.size());
    if (std::find(known.begin(), known.end(), name) != known.end()) continue;
    std::string takes;
    for (const std::string_view field : known) takes += (takes.empty() ? "" : ", ") + Quoted(field);
    const std::string shown = PrintableText(name, kMaxShownBytes);
    return fields.Fail(shown, Quoted(shown) + " is no field of this verb; it takes " + takes,
                       "unknown_field");
  }
}

constexpr char kSequenceForms[] =
    "a sequence's \"id\" or \"request\" as GET /strait/status tells it, with \"/choice\" behind a "
    "request that has several";
constexpr char kWorkerForms[] = "a worker's \"id\" or \"name\" as GET /strait/status tells it";

// The id or name of what a verb is for; `forms` says what it may be.
std::string ReadName(Fields& fields, const char* key, size_t max_bytes, const std::string& forms) {
  const json::Value* value = fields.Any(key);
  if (value == nullptr) {
    fields.Fail(key, Quoted(key) + " is missing: it is " + forms);
    return "";
  }
  if (const std::optional<int64_t> id = WholeNumber(*value); id && *id > 0) {
    return std::to_string(*id);
  }
  if (!value->is_string()) {
    fields.Fail(key, Quoted(key) + " must be a string, not " + std::string(json::TypeName(*value)) +
                         ": " + forms);
    return "";
  }
  std::string name(json::View(value->get_string()));
  if (name.empty() || name.size() > max_bytes) {
    fields.Fail(key, Quoted(key) + " has " + std::to_string(name.size()) +
                         " bytes; it must have 1 to " + std::to_string(max_bytes) + ": it is " +
                         forms);
  }
  return name;
}

// A time that was given is none that means the server's.
uint64_t ReadTimeoutUs(Fields& fields) {
  const double seconds = fields.Number("timeout", 0, 0, kMaxVerbSeconds, fields.Any("timeout"));
  return fields.Any("timeout") ? std::max<uint64_t>(static_cast<uint64_t>(seconds * 1e6), 1) : 0;
}

}  // namespace

std::variant<MigrateSpec, ApiError> ParseMigrate(std::string_view body) {
  std::variant<json::Object, ApiError> parsed = ParseBody(body);
  if (auto* error = std::get_if<ApiError>(&parsed)) return std::move(*error);
  const json::Object& object = std::get<json::Object>(parsed);
  Fields fields(object);
  RefuseUnknown(fields, object, {"sequence", "to", "dry_run", "timeout", "force_numerics"});
  MigrateSpec spec;
  spec.sequence = ReadName(fields, "sequence", kMaxSequenceNameBytes, kSequenceForms);
  const std::optional<int64_t> to = fields.Int("to", 1, std::numeric_limits<uint32_t>::max());
  if (!to) fields.Fail("to", "\"to\" is missing: it is the \"id\" of a pipeline");
  spec.to = PipelineId{static_cast<uint64_t>(to.value_or(0))};
  spec.dry_run = fields.Bool("dry_run", false);
  spec.force_numerics = fields.Bool("force_numerics", false);
  spec.timeout_us = ReadTimeoutUs(fields);
  if (!fields.ok()) return *fields.error();
  return spec;
}

std::variant<DrainSpec, ApiError> ParseDrain(std::string_view body) {
  std::variant<json::Object, ApiError> parsed = ParseBody(body);
  if (auto* error = std::get_if<ApiError>(&parsed)) return std::move(*error);
  const json::Object& object = std::get<json::Object>(parsed);
  Fields fields(object);
  RefuseUnknown(fields, object, {"worker", "dry_run", "undo", "timeout"});
  DrainSpec spec;
  spec.worker = ReadName(fields, "worker", kMaxWorkerNameBytes, kWorkerForms);
  spec.dry_run = fields.Bool("dry_run", false);
  spec.undo = fields.Bool("undo", false);
  spec.timeout_us = ReadTimeoutUs(fields);
  if (!fields.ok()) return *fields.error();
  return spec;
}

std::variant<ScaleRequest, ApiError> ParseScale(std::string_view body) {
  std::variant<json::Object, ApiError> parsed = ParseBody(body);
  if (auto* error = std::get_if<ApiError>(&parsed)) return std::move(*error);
  const json::Object& object = std::get<json::Object>(parsed);
  Fields fields(object);
  RefuseUnknown(fields, object, {"stages", "dry_run", "progress"});
  const std::optional<int64_t> stages = fields.Int("stages", 1, limits::kMaxStagesPerPipeline);
  if (!stages) fields.Fail("stages", "\"stages\" is missing: how many each pipeline is to have");
  ScaleRequest request;
  request.spec.dry_run = fields.Bool("dry_run", false);
  request.progress = fields.Bool("progress", false);
  if (!fields.ok()) return *fields.error();
  request.spec.num_stages = static_cast<uint32_t>(*stages);
  return request;
}

ApiError ToVerbError(const absl::Status& status) {
  ApiError error = ToApiError(status);
  switch (status.code()) {
    case absl::StatusCode::kNotFound:
      error.status = 404;
      error.code = "not_found";
      break;
    case absl::StatusCode::kFailedPrecondition:
      error.status = 409;
      error.code = "not_now";
      break;
    case absl::StatusCode::kCancelled:
      error.status = 409;
      error.code = "cancelled";
      break;
    case absl::StatusCode::kUnimplemented:
      error.status = 501;
      error.code = "not_implemented";
      break;
    case absl::StatusCode::kResourceExhausted:
      error.status = 507;
      error.code = "no_room";
      break;
    case absl::StatusCode::kAborted:
      error.code = "aborted";  // 503, and worth another try
      break;
    default:
      break;
  }
  return error;
}

}  // namespace strait
