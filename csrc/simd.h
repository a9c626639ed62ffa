// Vectors of the instruction set a file is compiled for. Every kernel file is compiled once per level with
// COSERVE_ISA naming its namespace, so nothing here may have external linkage outside that namespace: an
// inline function shared by two levels could leave AVX-512 code on a CPU without it.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace coserve {
namespace COSERVE_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

struct bf16 {
  uint16_t bits;
};

static inline vf splat(float x) {
  return x - vf{};  // x + 0 would turn -0 into 0 and cost an addition
}
static inline vf vmax(vf a, vf b) {  // b where either is NaN
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
static inline vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

static inline vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, vf v) {
  memcpy(p, &v, sizeof v);
}
static inline vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
static inline void store(bf16* p, vf v) {  // round to nearest even; NaN stays a quiet NaN
#if defined(__AVX512BF16__)
  auto h = _mm512_cvtneps_pbh((__m512)v);  // subnormal values become 0
  memcpy(p, &h, sizeof h);
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu quiet = (u >> 16) | 0x40;
  vh h = __builtin_convertvector(v == v ? rounded : quiet, vh);
  memcpy(p, &h, sizeof h);
#endif
}

// The first n < VL elements; the rest of the vector is 0, memory behind them is not touched.
template <class T>
static inline vf load_n(const T* p, int64_t n) {
  T buffer[VL] = {};
  for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
static inline void store_n(T* p, vf v, int64_t n) {
  T buffer[VL];
  store(buffer, v);
  for (int64_t i = 0; i < n; i++) p[i] = buffer[i];
}
// Elements [i, i + VL) of a row of n.
template <class T>
static inline vf load_at(const T* p, int64_t i, int64_t n) {
  return i + VL <= n ? load(p + i) : load_n(p + i, n - i);
}
template <class T>
static inline void store_at(T* p, vf v, int64_t i, int64_t n) {
  if (i + VL <= n)
    store(p + i, v);
  else
    store_n(p + i, v, n - i);
}

static inline float reduce_add(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float lane[VL];
  store(lane, v);
  for (int width = VL / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
#endif
}
static inline float reduce_max(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float lane[VL];
  store(lane, v);
  for (int width = VL / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
#endif
}

// e^x to about 1 ulp for x in [-87.3, 88]; exactly 0 below (so that masked scores vanish), capped above.
static inline vf vexp(vf x) {
  const vf low = splat(-87.3f), magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf clamped = vmin(vmax(x, low), splat(88.0f));
  vf shifted = fma(clamped, splat(1.44269504f), magic);
  vf n = shifted - magic;
  vf r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p * r, r, r + 1.0f);
#if defined(__AVX512F__)
  __mmask16 vanishes = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_LT_OQ);
  return (vf)_mm512_mask_scalef_ps(_mm512_setzero_ps(), ~vanishes, (__m512)p, (__m512)n);
#else
  vi exponent = ((vi)shifted - (vi)magic + 127) << 23;
  vf result = p * (vf)exponent;
  return x < low ? vf{} : result;
#endif
}
static inline float exp1(float x) {
  return vexp(splat(x))[0];
}
static inline vf sigmoid(vf x) {
  return 1.0f / (1.0f + vexp(-x));
}

// tanh to about 2 ulp: an odd polynomial below 5/8 (Cephes' tanhf), 1 - 2 / (e^2x + 1) beyond.
static inline vf vtanh(vf x) {
  vf size = vmax(x, -x), square = x * x;
  vf p = fma(square, splat(-5.70498872745e-3f), splat(2.06390887954e-2f));
  p = fma(p, square, splat(-5.37397155531e-2f));
  p = fma(p, square, splat(1.33314422036e-1f));
  p = fma(p, square, splat(-3.33332819422e-1f));
  vf small = fma(p * square, x, x);
  vf large = 1.0f - 2.0f / (vexp(size + size) + 1.0f);
  large = x < 0.0f ? -large : large;
  return size >= 0.625f ? large : small;  // NaN stays
}

}  // namespace COSERVE_ISA
}  // namespace coserve
