// SPDX-License-Identifier: Apache-2.0
#include "kernels/float64_math.h"

#include <bit>
#include <cmath>
#include <cstdint>

namespace strait {
namespace {

constexpr double kRound = 0x1.8p52;  // adding and subtracting it rounds to an integer

// ln 2 and pi/2 in parts; with fused multiply-adds each part is taken off with one rounding.
constexpr double kLn2High = 0x1.62e42fefa39efp-1;
constexpr double kLn2Low = 0x1.abc9e3b39803fp-56;
constexpr double kHalfPi1 = 0x1.921fb54442d18p+0;
constexpr double kHalfPi2 = 0x1.1a62633145c07p-54;
constexpr double kHalfPi3 = -0x1.f1976b7ed8fbcp-110;

double PowerOfTwo(int64_t n) {
  return std::bit_cast<double>(static_cast<uint64_t>(n + 1023) << 52);
}

}  // namespace

SinCos Float64SinCos(double x) {
  const double n = (x * 0x1.45f306dc9c883p-1 + kRound) - kRound;
  double r = std::fma(n, -kHalfPi1, x);
  // What the second part takes off is larger than r's rounding: keep its error for the last step.
  const double high = r;
  r = std::fma(n, -kHalfPi2, high);
  const double lost = std::fma(n, -kHalfPi2, high - r);
  r += std::fma(n, -kHalfPi3, lost);

  // Taylor's series for |r| <= pi/4: the rest is below 2^-56.
  const double z = r * r;
  double s = -1.0 / 121645100408832000.0;  // 19!
  s = std::fma(s, z, 1.0 / 355687428096000.0);
  s = std::fma(s, z, -1.0 / 1307674368000.0);
  s = std::fma(s, z, 1.0 / 6227020800.0);
  s = std::fma(s, z, -1.0 / 39916800.0);
  s = std::fma(s, z, 1.0 / 362880.0);
  s = std::fma(s, z, -1.0 / 5040.0);
  s = std::fma(s, z, 1.0 / 120.0);
  s = std::fma(s, z, -1.0 / 6.0);
  const double sine = std::fma(s * z, r, r);
  double c = 1.0 / 2432902008176640000.0;  // 20!
  c = std::fma(c, z, -1.0 / 6402373705728000.0);
  c = std::fma(c, z, 1.0 / 20922789888000.0);
  c = std::fma(c, z, -1.0 / 87178291200.0);
  c = std::fma(c, z, 1.0 / 479001600.0);
  c = std::fma(c, z, -1.0 / 3628800.0);
  c = std::fma(c, z, 1.0 / 40320.0);
  c = std::fma(c, z, -1.0 / 720.0);
  c = std::fma(c, z, 1.0 / 24.0);
  c = std::fma(c, z, -0.5);
  const double cosine = std::fma(c, z, 1.0);

  switch (static_cast<int64_t>(n) & 3) {
    case 0:
      return {sine, cosine};
    case 1:
      return {cosine, -sine};
    case 2:
      return {-sine, -cosine};
    default:
      return {-cosine, sine};
  }
}

double Float64Exp(double x) {
  const double n = (x * 0x1.71547652b82fep+0 + kRound) - kRound;
  const double r = std::fma(n, -kLn2Low, std::fma(n, -kLn2High, x));
  double p = 1.0;  // Horner's scheme on the series: 1 + r/1 (1 + r/2 (1 + ...)); the rest < 2^-58
  for (int i = 15; i >= 1; --i) p = std::fma(p * r, 1.0 / i, 1.0);
  return p * PowerOfTwo(static_cast<int64_t>(n));
}

double Float64Log(double x) {
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)); log m = 2 artanh((m - 1) / (m + 1)).
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  int64_t e = static_cast<int64_t>(bits >> 52) - 1023;
  double m = std::bit_cast<double>((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 0x1.6a09e667f3bcdp+0) {
    m *= 0.5;
    ++e;
  }
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double p = 1.0 / 23.0;
  for (int i = 21; i >= 3; i -= 2) p = std::fma(p, z, 1.0 / i);
  const double log_m = std::fma(2.0 * s * z, p, 2.0 * s);
  const double exponent = static_cast<double>(e);
  return std::fma(exponent, kLn2High, std::fma(exponent, kLn2Low, log_m));
}

}  // namespace strait
