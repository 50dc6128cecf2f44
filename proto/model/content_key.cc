// SPDX-License-Identifier: Apache-2.0
#include "proto/model/content_key.h"

#include <openssl/sha.h>

#include <bit>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"

namespace strait {
namespace {

static_assert(std::endian::native == std::endian::little, "keys are hashed and packed as they lie");

void AppendField(const void* data, size_t bytes, std::string* to) {
  const uint64_t length = bytes;
  to->append(reinterpret_cast<const char*>(&length), sizeof(length));
  to->append(static_cast<const char*>(data), bytes);
}

ContentDigest Sha256(const void* data, size_t bytes) {
  ContentDigest digest;
  SHA256(static_cast<const uint8_t*>(data), bytes, digest.data());
  return digest;
}

}  // namespace

ContentDigest DigestOf(const ContentOrigin& origin) {
  // Each field with its length: no two origins give the same bytes.
  std::string bytes = "strait content 1";
  AppendField(&origin.model, sizeof(origin.model), &bytes);
  AppendField(&origin.weights, sizeof(origin.weights), &bytes);
  for (const std::string_view field : {origin.numerics, origin.policy, origin.salt}) {
    AppendField(field.data(), field.size(), &bytes);
  }
  return Sha256(bytes.data(), bytes.size());
}

ContentDigest Extend(const ContentDigest& before, absl::Span<const TokenId> tokens) {
  STRAIT_CHECK(tokens.size() == limits::kBlockTokens, "a key is of a full block");
  std::array<uint8_t, sizeof(ContentDigest) + limits::kBlockTokens * sizeof(TokenId)> bytes;
  std::memcpy(bytes.data(), before.data(), before.size());
  std::memcpy(bytes.data() + before.size(), tokens.data(), tokens.size() * sizeof(TokenId));
  return Sha256(bytes.data(), bytes.size());
}

ContentKey KeyOf(const ContentDigest& digest) {
  ContentKey key;
  std::memcpy(&key, digest.data(), sizeof(key));
  if (key == ContentKey()) key.low = 1;  // 0 stands for none
  return key;
}

void AppendTo(const ContentKey& key, std::string* packed) {
  packed->append(reinterpret_cast<const char*>(&key), sizeof(key));
}

std::string Pack(absl::Span<const ContentKey> keys) {
  std::string packed;
  packed.reserve(keys.size() * kContentKeyBytes);
  for (const ContentKey& key : keys) AppendTo(key, &packed);
  return packed;
}

absl::StatusOr<std::vector<ContentKey>> ParseContentKeys(std::string_view packed) {
  if (packed.size() % kContentKeyBytes != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(packed.size(), " bytes of content keys, each has ", kContentKeyBytes));
  }
  std::vector<ContentKey> keys(packed.size() / kContentKeyBytes);
  if (!keys.empty()) std::memcpy(keys.data(), packed.data(), packed.size());
  for (const ContentKey& key : keys) {
    if (key == ContentKey()) return absl::InvalidArgumentError("a content key of 0");
  }
  return keys;
}

}  // namespace strait
