// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/served_model.h"

#include <cstdio>

#include "coordinator/text/detokenizer.h"

namespace strait {

std::string TokenText(const ServedModel& model, TokenId id) {
  if (!model.tokenizer) return "";
  std::string_view bytes = model.tokenizer->TokenBytes(id);
  if (bytes.empty()) bytes = model.tokenizer->IdToToken(id).value_or("");
  return std::string(bytes);
}

std::string TokenName(const ServedModel& model, TokenId id, bool as_id) {
  const std::string bytes = as_id ? "" : TokenText(model, id);
  if (bytes.empty()) return "token_id:" + std::to_string(id);
  if (!FindInvalidUtf8(bytes)) return bytes;
  std::string name = "bytes:";
  for (const unsigned char c : bytes) {
    char hex[5];
    std::snprintf(hex, sizeof(hex), "\\x%02x", c);
    name += hex;
  }
  return name;
}

}  // namespace strait
