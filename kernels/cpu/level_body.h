// SPDX-License-Identifier: Apache-2.0
//
// Included by each level_*.cc after it has named its level: makes the level's table.
#pragma once

#include "kernels/cpu/elementwise_body.h"
#include "kernels/cpu/gemm_body.h"
#include "kernels/cpu/mla_body.h"

#define STRAIT_LEVEL_TABLE                                                                       \
  {                                                                                              \
    &STRAIT_LEVEL::Gemm, &STRAIT_LEVEL::RmsNorm, &STRAIT_LEVEL::Absorb, &STRAIT_LEVEL::MlaSpans, \
        &STRAIT_LEVEL::MlaFold, &STRAIT_LEVEL::MlaFinish, &STRAIT_LEVEL::SiluMul,                \
        &STRAIT_LEVEL::AddTo, &STRAIT_LEVEL::ExpertSum, &STRAIT_LEVEL::ExpShifted,               \
        &STRAIT_LEVEL::SigmoidOf, &STRAIT_LEVEL::SumExp, &STRAIT_LEVEL::WidenRow                 \
  }
