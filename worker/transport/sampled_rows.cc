// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/sampled_rows.h"

#include <bit>
#include <cstring>
#include <utility>
#include <vector>

#include "proto/base/check.h"

namespace strait {

static_assert(sizeof(TokenId) == 4 && std::endian::native == std::endian::little);

HiddenStep ToRows(const SampledStep& sampled) {
  std::vector<std::byte> data(sampled.tokens.size() * kSampledRowBytes);
  std::memcpy(data.data(), sampled.tokens.data(), data.size());
  return {sampled.epoch, sampled.step, static_cast<uint32_t>(sampled.tokens.size()),
          std::move(data)};
}

SampledStep FromRows(const HiddenStep& rows) {
  STRAIT_CHECK(rows.data.size() == size_t{rows.num_tokens} * kSampledRowBytes);
  SampledStep sampled{rows.epoch, rows.step, std::vector<TokenId>(rows.num_tokens)};
  std::memcpy(sampled.tokens.data(), rows.data.data(), rows.data.size());
  return sampled;
}

}  // namespace strait
