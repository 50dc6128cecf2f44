// SPDX-License-Identifier: Apache-2.0
//
// Vec and F32x16: the vectors of one instruction set, and the order in which 16 lanes are summed.
//
// Thread:  any; values.
// Why:     included only by level_*.cc, each compiled with its own flags; everything lives in the
//          level's namespace and calls nothing from std:: that a linker could merge across levels.
//          All operations used are exactly rounded, so every level gives the same bits. Vec is the
//          native width; F32x16 is 16 logical lanes in 16/kLanes of them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(STRAIT_LEVEL_AVX2) || defined(STRAIT_LEVEL_AVX512)
#include <immintrin.h>
#else
#include <cmath>
#endif

#define STRAIT_INLINE inline __attribute__((always_inline))
#define STRAIT_INLINE_LAMBDA __attribute__((always_inline))
// Loops over tile dimensions must vanish, so that a tile's sums live in registers.
#define STRAIT_UNROLL _Pragma("GCC unroll 32")

namespace strait::cpu::STRAIT_LEVEL {

STRAIT_INLINE uint32_t BitsOf(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
STRAIT_INLINE float FloatOf(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

#if defined(STRAIT_LEVEL_AVX512)

inline constexpr int kLanes = 16;
using Vec = __m512;

STRAIT_INLINE Vec Zero() { return _mm512_setzero_ps(); }
STRAIT_INLINE Vec Set1(float v) { return _mm512_set1_ps(v); }
STRAIT_INLINE Vec Load(const float* p) { return _mm512_loadu_ps(p); }
STRAIT_INLINE void Store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
STRAIT_INLINE Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
STRAIT_INLINE Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
STRAIT_INLINE Vec Sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
STRAIT_INLINE Vec Mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
STRAIT_INLINE Vec Div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// a > b ? a : b, so b where either is NaN.
STRAIT_INLINE Vec Max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
STRAIT_INLINE Vec Min(Vec a, Vec b) { return _mm512_min_ps(a, b); }

STRAIT_INLINE Vec LoadBf16(const void* p) {
  const __m256i raw = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
STRAIT_INLINE Vec LoadF16(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
// e4m3 code * 2^-8, exact; see Fp8Half below.
STRAIT_INLINE Vec LoadFp8(const void* p) {
  const __m128i raw = _mm_loadu_si128(static_cast<const __m128i*>(p));
  const __m256i wide = _mm256_cvtepi8_epi16(raw);
  const __m256i nan =
      _mm256_cmpeq_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7f));
  const __m256i half =
      _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbfff)));
  return _mm512_cvtph_ps(_mm256_or_si256(half, _mm256_and_si256(nan, _mm256_set1_epi16(0x7fff))));
}
// The same for codes of which none is NaN.
STRAIT_INLINE Vec LoadFp8Finite(const void* p) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(
      _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbfff))));
}
// v * 2^n for an integral n in [-252, 252]; rounds once, also where the result is subnormal.
STRAIT_INLINE Vec ScaleByPowerOfTwo(Vec v, Vec n) {
  const __m512i whole = _mm512_cvtps_epi32(n);
  const __m512i first = _mm512_srai_epi32(whole, 1);
  const __m512i second = _mm512_sub_epi32(whole, first);
  const __m512i bias = _mm512_set1_epi32(127);
  const Vec f1 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(first, bias), 23));
  const Vec f2 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(second, bias), 23));
  return Mul(Mul(v, f1), f2);
}

#elif defined(STRAIT_LEVEL_AVX2)

inline constexpr int kLanes = 8;
using Vec = __m256;

STRAIT_INLINE Vec Zero() { return _mm256_setzero_ps(); }
STRAIT_INLINE Vec Set1(float v) { return _mm256_set1_ps(v); }
STRAIT_INLINE Vec Load(const float* p) { return _mm256_loadu_ps(p); }
STRAIT_INLINE void Store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
STRAIT_INLINE Vec Fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
STRAIT_INLINE Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
STRAIT_INLINE Vec Sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
STRAIT_INLINE Vec Mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
STRAIT_INLINE Vec Div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
STRAIT_INLINE Vec Max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
STRAIT_INLINE Vec Min(Vec a, Vec b) { return _mm256_min_ps(a, b); }

STRAIT_INLINE Vec LoadBf16(const void* p) {
  const __m128i raw = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
STRAIT_INLINE Vec LoadF16(const void* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
STRAIT_INLINE Vec LoadFp8(const void* p) {
  const __m128i raw = _mm_loadl_epi64(static_cast<const __m128i*>(p));
  const __m128i wide = _mm_cvtepi8_epi16(raw);
  const __m128i nan =
      _mm_cmpeq_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7f));
  const __m128i half =
      _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<short>(0xbfff)));
  return _mm256_cvtph_ps(_mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7fff))));
}
STRAIT_INLINE Vec LoadFp8Finite(const void* p) {
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
  return _mm256_cvtph_ps(
      _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<short>(0xbfff))));
}
STRAIT_INLINE Vec ScaleByPowerOfTwo(Vec v, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i first = _mm256_srai_epi32(whole, 1);
  const __m256i second = _mm256_sub_epi32(whole, first);
  const __m256i bias = _mm256_set1_epi32(127);
  const Vec f1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23));
  const Vec f2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, bias), 23));
  return Mul(Mul(v, f1), f2);
}

#else  // portable

inline constexpr int kLanes = 16;
struct Vec {
  float f[16];
};

// Applies an expression to lane i of every operand.
#define STRAIT_LANES(expression)                      \
  Vec r;                                              \
  for (int i = 0; i < 16; ++i) r.f[i] = (expression); \
  return r

STRAIT_INLINE Vec Zero() { STRAIT_LANES(0.0f); }
STRAIT_INLINE Vec Set1(float v) { STRAIT_LANES(v); }
STRAIT_INLINE Vec Load(const float* p) {
  Vec r;
  memcpy(&r, p, sizeof(r));
  return r;
}
STRAIT_INLINE void Store(float* p, const Vec& v) { memcpy(p, &v, sizeof(v)); }
STRAIT_INLINE Vec Fma(const Vec& a, const Vec& b, const Vec& c) {
  STRAIT_LANES(__builtin_fmaf(a.f[i], b.f[i], c.f[i]));
}
STRAIT_INLINE Vec Add(const Vec& a, const Vec& b) { STRAIT_LANES(a.f[i] + b.f[i]); }
STRAIT_INLINE Vec Sub(const Vec& a, const Vec& b) { STRAIT_LANES(a.f[i] - b.f[i]); }
STRAIT_INLINE Vec Mul(const Vec& a, const Vec& b) { STRAIT_LANES(a.f[i] * b.f[i]); }
STRAIT_INLINE Vec Div(const Vec& a, const Vec& b) { STRAIT_LANES(a.f[i] / b.f[i]); }
STRAIT_INLINE Vec Max(const Vec& a, const Vec& b) {
  STRAIT_LANES(a.f[i] > b.f[i] ? a.f[i] : b.f[i]);
}
STRAIT_INLINE Vec Min(const Vec& a, const Vec& b) {
  STRAIT_LANES(a.f[i] < b.f[i] ? a.f[i] : b.f[i]);
}

STRAIT_INLINE float HalfToFloat(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    const uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0;
    return FloatOf(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13) | quiet);
  }
  // Shifted into place a half is 2^-112 of its value, subnormals included.
  return FloatOf(sign | BitsOf(FloatOf(magnitude << 13) * 0x1p112f));
}
STRAIT_INLINE Vec LoadBf16(const void* p) {
  uint16_t raw[16];
  memcpy(raw, p, sizeof(raw));
  STRAIT_LANES(FloatOf(static_cast<uint32_t>(raw[i]) << 16));
}
STRAIT_INLINE Vec LoadF16(const void* p) {
  uint16_t raw[16];
  memcpy(raw, p, sizeof(raw));
  STRAIT_LANES(HalfToFloat(raw[i]));
}
STRAIT_INLINE float Fp8Half(uint32_t code) {
  if ((code & 0x7fu) == 0x7fu) return HalfToFloat((code & 0x80u) << 8 | 0x7fffu);
  return HalfToFloat((code & 0x80u) << 8 | (code & 0x7fu) << 7);
}
// e4m3 code * 2^-8, exact: the code's exponent and mantissa read as those of a half.
STRAIT_INLINE Vec LoadFp8(const void* p) {
  uint8_t raw[16];
  memcpy(raw, p, sizeof(raw));
  STRAIT_LANES(Fp8Half(raw[i]));
}
STRAIT_INLINE Vec LoadFp8Finite(const void* p) { return LoadFp8(p); }
STRAIT_INLINE float ScaleOne(float v, float n) {
  if (n != n) return n;
  const int whole = static_cast<int>(n);
  const int first = whole >> 1;
  const int second = whole - first;
  return v * FloatOf(static_cast<uint32_t>(first + 127) << 23) *
         FloatOf(static_cast<uint32_t>(second + 127) << 23);
}
STRAIT_INLINE Vec ScaleByPowerOfTwo(const Vec& v, const Vec& n) {
  STRAIT_LANES(ScaleOne(v.f[i], n.f[i]));
}
#undef STRAIT_LANES

#endif

// Whether 16 fp8 codes hold no NaN (0x7f, 0xff).
STRAIT_INLINE bool Fp8Finite16(const char* p) {
#if defined(STRAIT_LEVEL_AVX2) || defined(STRAIT_LEVEL_AVX512)
  const __m128i magnitude = _mm_set1_epi8(0x7f);
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_movemask_epi8(_mm_cmpeq_epi8(_mm_and_si128(raw, magnitude), magnitude)) == 0;
#else
  bool finite = true;
  for (int i = 0; i < 16; ++i) finite &= (p[i] & 0x7f) != 0x7f;
  return finite;
#endif
}
// Whether 128 of them hold none.
STRAIT_INLINE bool Fp8Finite128(const char* p) {
#if defined(STRAIT_LEVEL_AVX512)
  const __m512i magnitude = _mm512_set1_epi8(0x7f);
  const __m512i low = _mm512_and_si512(_mm512_loadu_si512(p), magnitude);
  const __m512i high = _mm512_and_si512(_mm512_loadu_si512(p + 64), magnitude);
  return _mm512_cmpeq_epi8_mask(_mm512_max_epu8(low, high), magnitude) == 0;
#elif defined(STRAIT_LEVEL_AVX2)
  const __m256i magnitude = _mm256_set1_epi8(0x7f);
  __m256i most = _mm256_setzero_si256();
  STRAIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i));
    most = _mm256_max_epu8(most, _mm256_and_si256(raw, magnitude));
  }
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(most, magnitude)) == 0;
#else
  bool finite = true;
  for (int i = 0; i < 128; i += 16) finite &= Fp8Finite16(p + i);
  return finite;
#endif
}

inline constexpr int kParts = 16 / kLanes;

// 16 logical lanes.
struct F32x16 {
  Vec part[kParts];
};

STRAIT_INLINE F32x16 Zero16() {
  F32x16 r;
  STRAIT_UNROLL
  for (int p = 0; p < kParts; ++p) r.part[p] = Zero();
  return r;
}
STRAIT_INLINE F32x16 Load16(const float* from) {
  F32x16 r;
  STRAIT_UNROLL
  for (int p = 0; p < kParts; ++p) r.part[p] = Load(from + p * kLanes);
  return r;
}
STRAIT_INLINE void Store16(float* to, const F32x16& v) {
  STRAIT_UNROLL
  for (int p = 0; p < kParts; ++p) Store(to + p * kLanes, v.part[p]);
}
#define STRAIT_BINARY16(name, op)                                          \
  STRAIT_INLINE F32x16 name(const F32x16& a, const F32x16& b) {            \
    F32x16 r;                                                              \
    STRAIT_UNROLL                                                          \
    for (int p = 0; p < kParts; ++p) r.part[p] = op(a.part[p], b.part[p]); \
    return r;                                                              \
  }
STRAIT_BINARY16(Add16, Add)
STRAIT_BINARY16(Sub16, Sub)
STRAIT_BINARY16(Mul16, Mul)
STRAIT_BINARY16(Max16, Max)
#undef STRAIT_BINARY16
STRAIT_INLINE F32x16 Fma16(const F32x16& a, const F32x16& b, const F32x16& c) {
  F32x16 r;
  STRAIT_UNROLL
  for (int p = 0; p < kParts; ++p) r.part[p] = Fma(a.part[p], b.part[p], c.part[p]);
  return r;
}

// The one tree: l[j] + l[j+8], then + l[j+4], + l[j+2], + l[j+1].
STRAIT_INLINE float Reduce(const F32x16& v) {
#if defined(STRAIT_LEVEL_AVX2) || defined(STRAIT_LEVEL_AVX512)
#if defined(STRAIT_LEVEL_AVX512)
  const __m256 eight =
      _mm256_add_ps(_mm512_castps512_ps256(v.part[0]), _mm512_extractf32x8_ps(v.part[0], 1));
#else
  const __m256 eight = _mm256_add_ps(v.part[0], v.part[1]);
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float l[16];
  Store16(l, v);
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) l[j] += l[j + width];
  }
  return l[0];
#endif
}

// The greatest of 16 lanes, by the same tree.
STRAIT_INLINE float ReduceMax(const F32x16& v) {
  float l[16];
  Store16(l, v);
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) l[j] = l[j] > l[j + width] ? l[j] : l[j + width];
  }
  return l[0];
}

// exp(v) within 1.5 ulp: v = n ln 2 + r, a polynomial of degree 7 in r (Taylor's: the rest is below
// 2^-27), scaled by 2^n. 0 below -104, infinity above 89, NaN stays NaN.
STRAIT_INLINE Vec Exp(Vec v) {
  const Vec x = Min(Set1(90.0f), Max(Set1(-110.0f), v));
  const Vec magic = Set1(0x1.8p23f);  // adding it rounds to an integer
  const Vec n = Sub(Fma(x, Set1(0x1.715476p+0f), magic), magic);
  Vec r = Fma(n, Set1(-0x1.62e430p-1f), x);
  r = Fma(n, Set1(0x1.05c610p-29f), r);
  Vec p = Set1(1.0f / 5040.0f);
  p = Fma(p, r, Set1(1.0f / 720.0f));
  p = Fma(p, r, Set1(1.0f / 120.0f));
  p = Fma(p, r, Set1(1.0f / 24.0f));
  p = Fma(p, r, Set1(1.0f / 6.0f));
  p = Fma(p, r, Set1(0.5f));
  p = Fma(p, r, Set1(1.0f));
  p = Fma(p, r, Set1(1.0f));
  return ScaleByPowerOfTwo(p, n);
}

STRAIT_INLINE float ExpOne(float v) {
  float lanes[16];
  Store(lanes, Exp(Set1(v)));
  return lanes[0];
}

// 1 / (1 + exp(-v)).
STRAIT_INLINE Vec Sigmoid(Vec v) {
  const Vec one = Set1(1.0f);
  return Div(one, Add(one, Exp(Sub(Zero(), v))));
}

}  // namespace strait::cpu::STRAIT_LEVEL
