// SPDX-License-Identifier: Apache-2.0
//
// Writes small safetensors files and checkpoint directories, whole ones and broken ones.
//
// Thread:  one test.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "proto/model/model_config.h"

namespace strait::testing {

struct RawTensor {
  std::string dtype;
  std::vector<uint64_t> shape;
  std::string bytes;
};

// A fresh directory of the running test.
std::string FreshDir();
void WriteText(const std::string& path, const std::string& text);
std::string ReadText(const std::string& path);

// The bytes of a safetensors file with this header and data; `length` defaults to the header's.
std::string RawSafetensors(const std::string& header, const std::string& data);
// `pad` spaces end the header: it moves the data against element boundaries.
std::string Safetensors(const std::map<std::string, RawTensor>& tensors, size_t pad = 0);

// Every tensor that a tiny model with this config has, filled with bf16 noise that depends on the
// name. Vectors are bf16 too, e_score_correction_bias is fp32.
std::map<std::string, RawTensor> TensorsOf(const ModelConfig& config);

RawTensor Bf16Noise(const std::string& name, std::vector<uint64_t> shape);

// A V3 config.json of about 10 kB of weights; `extra` is appended and wins ("" or ", \"key\":
// value").
std::string TinyConfig(const std::string& extra = "");

}  // namespace strait::testing
