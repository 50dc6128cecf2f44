// SPDX-License-Identifier: Apache-2.0
#include "worker/checkpoint/checkpoint.h"

#include <filesystem>
#include <optional>
#include <set>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/base/json.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"

namespace strait {
namespace {

constexpr char kOnlyFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr size_t kMaxFileNameBytes = 255;

std::string_view SafetensorsName(WeightType type) {
  switch (type) {
    case WeightType::kFp32:
      return "F32";
    case WeightType::kBf16:
      return "BF16";
    case WeightType::kFp16:
      return "F16";
    case WeightType::kFp8E4m3:
      return "F8_E4M3";
  }
  return "?";
}

std::optional<WeightType> TypeOf(std::string_view name, absl::Span<const WeightType> types) {
  for (const WeightType type : types) {
    if (SafetensorsName(type) == name) return type;
  }
  return std::nullopt;
}

// A file of the checkpoint's own directory and nothing else.
bool IsShardName(std::string_view name) {
  return !name.empty() && name.size() <= kMaxFileNameBytes && name.front() != '.' &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string_view::npos &&
         absl::EndsWith(ToAbsl(name), ".safetensors");
}

}  // namespace

absl::StatusOr<std::shared_ptr<Checkpoint>> Checkpoint::Open(const std::string& dir) {
  STRAIT_ASSIGN_OR_RETURN(ModelConfig config, LoadModelConfig(dir));
  std::shared_ptr<Checkpoint> checkpoint(new Checkpoint(dir, std::move(config)));
  // As transformers do: the single file wins where both are there.
  std::error_code ignored;
  if (std::filesystem::exists(dir + "/" + kOnlyFile, ignored)) {
    STRAIT_ASSIGN_OR_RETURN(checkpoint->only_file_, SafetensorsFile::Open(dir + "/" + kOnlyFile));
    return checkpoint;
  }
  if (std::filesystem::exists(dir + "/" + kIndexFile, ignored)) {
    STRAIT_RETURN_IF_ERROR(checkpoint->ReadIndex());
    return checkpoint;
  }
  return absl::NotFoundError(absl::StrCat(dir, ": holds neither ", kOnlyFile, " nor ", kIndexFile,
                                          "; name the directory of a Hugging Face checkpoint"));
}

absl::Status Checkpoint::ReadIndex() {
  const std::string path = dir_ + "/" + kIndexFile;
  STRAIT_ASSIGN_OR_RETURN(const json::Value value, json::ParseFile(path, limits::kMaxIndexBytes));
  STRAIT_ASSIGN_OR_RETURN(const json::Object* object, json::AsObject(value, path));
  absl::StatusOr<const json::Object*> map = json::GetObject(*object, "weight_map", path);
  if (!map.ok()) return absl::InvalidArgumentError(map.status().message());

  absl::flat_hash_set<std::string> files;
  file_of_tensor_.reserve((*map)->size());
  for (const auto& item : **map) {
    const std::string tensor(item.key().data(), item.key().size());
    if (!item.value().is_string()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": weight_map: \"", tensor, "\" must name a file"));
    }
    std::string file(json::View(item.value().get_string()));
    if (!IsShardName(file)) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": weight_map: \"", tensor, "\" is in \"", file,
                       "\"; it must be a .safetensors file of the same directory"));
    }
    files.insert(file);
    if (files.size() > limits::kMaxShards) {
      return absl::ResourceExhaustedError(
          absl::StrCat(path, ": names more than ", limits::kMaxShards, " files"));
    }
    file_of_tensor_.emplace(tensor, std::move(file));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const SafetensorsFile>> Checkpoint::Shard(const std::string& file) {
  const std::lock_guard lock(mu_);
  const auto it = shards_.find(file);
  if (it != shards_.end()) return it->second;
  STRAIT_ASSIGN_OR_RETURN(std::shared_ptr<const SafetensorsFile> shard,
                          SafetensorsFile::Open(dir_ + "/" + file));
  shards_.emplace(file, shard);
  return shard;
}

std::vector<std::string> Checkpoint::files() const {
  if (only_file_ != nullptr) return {kOnlyFile};
  std::set<std::string> files;
  for (const auto& [tensor, file] : file_of_tensor_) files.insert(file);
  return {files.begin(), files.end()};
}

bool Checkpoint::Has(std::string_view name) const {
  return only_file_ != nullptr ? only_file_->Find(name) != nullptr
                               : file_of_tensor_.contains(ToAbsl(name));
}

absl::StatusOr<TensorView> Checkpoint::Get(std::string_view name, absl::Span<const uint64_t> shape,
                                           absl::Span<const WeightType> types) {
  std::shared_ptr<const SafetensorsFile> file = only_file_;
  if (file == nullptr) {
    const auto it = file_of_tensor_.find(ToAbsl(name));
    if (it == file_of_tensor_.end()) {
      return absl::NotFoundError(absl::StrCat(dir_, "/", kIndexFile, ": does not list tensor \"",
                                              ToAbsl(name),
                                              "\", which config.json asks for; one of them is not "
                                              "of this model"));
    }
    STRAIT_ASSIGN_OR_RETURN(file, Shard(it->second));
  }
  const TensorEntry* entry = file->Find(name);
  if (entry == nullptr) {
    return absl::NotFoundError(
        absl::StrCat(file->path(), ": tensor \"", ToAbsl(name), "\" is missing, which ",
                     only_file_ != nullptr ? "config.json asks for" : "the index says is there",
                     "; download the checkpoint again"));
  }
  if (absl::MakeConstSpan(entry->shape) != shape) {
    return absl::InvalidArgumentError(
        absl::StrCat(file->path(), ": tensor \"", ToAbsl(name), "\" has shape [",
                     absl::StrJoin(entry->shape, ", "), "], but config.json asks for [",
                     absl::StrJoin(shape, ", "), "]; one of them is not of this model"));
  }
  const std::optional<WeightType> type = TypeOf(entry->dtype, types);
  if (!type) {
    const std::string supported = absl::StrJoin(
        types, ", ", [](std::string* out, WeightType t) { *out += SafetensorsName(t); });
    return absl::InvalidArgumentError(absl::StrCat(file->path(), ": tensor \"", ToAbsl(name),
                                                   "\" has dtype ", entry->dtype,
                                                   "; supported are ", supported));
  }
  return TensorView{file->Data(*entry), *type, entry->shape, entry->bytes, file};
}

}  // namespace strait
