// SPDX-License-Identifier: Apache-2.0
//
// Sine, cosine, exponential and logarithm in float64, written out with exactly rounded operations.
//
// Thread:  any; pure functions.
// Why:     a math library may pick other code on another CPU and differ in the last bit; these
//          give the same bits everywhere, which the promise of equal tokens needs. Errors below
//          4e-16 relative (sine and cosine: 3e-16 absolute) for the arguments named.
#pragma once

namespace strait {

struct SinCos {
  double sin;
  double cos;
};

// REQUIRES: |x| <= 2^27 (angles of positions up to 134 million).
SinCos Float64SinCos(double x);

// REQUIRES: |x| <= 700.
double Float64Exp(double x);

// REQUIRES: x is positive, normal and finite.
double Float64Log(double x);

}  // namespace strait
