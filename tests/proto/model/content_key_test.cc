// SPDX-License-Identifier: Apache-2.0
//
// Defends: a key stands for all tokens before it and for all that rows follow from; no field can be moved into
// another; what is packed comes back, and what cannot be keys is refused.
#include "proto/model/content_key.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "proto/base/limits.h"

namespace strait {
namespace {

std::vector<TokenId> Tokens(TokenId first) {
  std::vector<TokenId> tokens;
  for (uint32_t i = 0; i < limits::kBlockTokens; ++i) tokens.push_back(first + i);
  return tokens;
}
ContentKey KeyAfter(const ContentOrigin& origin, const std::vector<TokenId>& starts) {
  ContentDigest digest = DigestOf(origin);
  for (const TokenId start : starts) digest = Extend(digest, Tokens(start));
  return KeyOf(digest);
}

TEST(ContentKeyTest, StandsForAllTokensBeforeIt) {
  const ContentOrigin origin{.model = 1, .weights = 2, .numerics = "n", .policy = "p"};
  std::set<ContentKey> keys;
  for (const std::vector<TokenId>& starts :
       std::vector<std::vector<TokenId>>{{}, {0}, {1}, {0, 0}, {0, 1}, {1, 0}, {64}, {0, 64}}) {
    EXPECT_TRUE(keys.insert(KeyAfter(origin, starts)).second) << testing::PrintToString(starts);
  }
  EXPECT_EQ(KeyAfter(origin, {5, 6}), KeyAfter(origin, {5, 6}));
}

TEST(ContentKeyTest, OneTokenMakesAnother) {
  const ContentDigest origin = DigestOf({});
  for (const uint32_t at : {0u, 31u, 63u}) {
    std::vector<TokenId> tokens = Tokens(0);
    ++tokens[at];
    EXPECT_NE(Extend(origin, tokens), Extend(origin, Tokens(0))) << at;
  }
}

// Everything that rows follow from is in it, and nothing of one field can become part of the next.
TEST(ContentKeyTest, NoTwoOriginsShare) {
  std::set<ContentDigest> digests;
  const std::vector<ContentOrigin> origins = {
      {},
      {.model = 1},
      {.weights = 1},
      {.model = 1, .weights = 1},
      {.numerics = "a"},
      {.policy = "a"},
      {.salt = "a"},
      {.numerics = "ab"},
      {.numerics = "a", .policy = "b"},
      {.numerics = "a", .salt = "b"},
      {.policy = "ab"},
      {.policy = "a", .salt = "b"},
      {.salt = "ab"},
      {.numerics = "a", .policy = "b", .salt = "c"},
      {.numerics = "", .policy = "a", .salt = "bc"},
      {.salt = std::string_view("\0", 1)},
      {.salt = std::string_view("a\0", 2)},
      {.policy = std::string_view("\0", 1)},
      // As if a salt held the fields before it, lengths included.
      {.policy = std::string_view("\1\0\0\0\0\0\0\0a", 9)},
      {.salt = std::string_view("\1\0\0\0\0\0\0\0a", 9)},
  };
  for (size_t i = 0; i < origins.size(); ++i) {
    EXPECT_TRUE(digests.insert(DigestOf(origins[i])).second) << i;
  }
}

// Workers of other builds must agree: FIPS 180-4 over these bytes.
TEST(ContentKeyTest, IsTheHeadOfTheDigest) {
  ContentDigest digest{};
  for (size_t i = 0; i < digest.size(); ++i) digest[i] = static_cast<uint8_t>(i + 1);
  EXPECT_EQ(KeyOf(digest), (ContentKey{.low = 0x0807060504030201, .high = 0x100F0E0D0C0B0A09}));
  EXPECT_NE(KeyOf(ContentDigest{}), ContentKey()) << "0 stands for none";
}

TEST(ContentKeyTest, PackedKeysComeBack) {
  const std::vector<ContentKey> keys = {
      {.low = 1, .high = 0}, {.low = 0, .high = 2}, {.low = ~0ull, .high = 3}};
  const std::string packed = Pack(keys);
  ASSERT_EQ(packed.size(), 3 * kContentKeyBytes);
  EXPECT_EQ(packed[0], 1) << "the low word first, its low byte first";
  EXPECT_EQ(packed[16 + 8], 2);
  const auto parsed = ParseContentKeys(packed);
  ASSERT_TRUE(parsed.ok());
  EXPECT_EQ(*parsed, keys);
  std::string appended;
  for (const ContentKey& key : keys) AppendTo(key, &appended);
  EXPECT_EQ(appended, packed);
  EXPECT_TRUE(ParseContentKeys("")->empty());
}

TEST(ContentKeyTest, WhatCannotBeKeysIsRefused) {
  for (const size_t bytes : {1u, 15u, 17u, 47u}) {
    const auto keys = ParseContentKeys(std::string(bytes, 'x'));
    EXPECT_EQ(keys.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(keys.status().message(),
              std::to_string(bytes) + " bytes of content keys, each has 16");
  }
  const auto none = ParseContentKeys(std::string(16, 'x') + std::string(16, '\0'));
  EXPECT_EQ(none.status().message(), "a content key of 0");
}

TEST(ContentKeyDeathTest, IsOfAFullBlock) {
  EXPECT_DEATH(Extend(DigestOf({}), std::vector<TokenId>(63)), "full block");
}

TEST(ContentKeyTest, KeysAreOrdered) {
  EXPECT_TRUE((ContentKey{.low = 9, .high = 1} < ContentKey{.low = 1, .high = 2}));
  EXPECT_TRUE((ContentKey{.low = 1, .high = 2} < ContentKey{.low = 2, .high = 2}));
  EXPECT_FALSE((ContentKey{.low = 2, .high = 2} < ContentKey{.low = 2, .high = 2}));
}

}  // namespace
}  // namespace strait
