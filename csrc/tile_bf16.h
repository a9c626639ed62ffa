// C = A B in bf16 with fp32 sums on AVX512-BF16's dot product of pairs (vdpbf16ps). Every element of C is one
// chain of dot products over ascending pairs of k, whatever the tile it falls into.
#pragma once
#include "parallel.h"
#include "simd.h"

#if defined(__AVX512BF16__)
namespace coserve {
namespace COSERVE_ISA {

constexpr int PAIR_ROWS = 6, PAIR_VECTORS = 4;  // 24 sums, 4 vectors of B, 1 of A
constexpr int64_t PAIR_COLUMNS = PAIR_VECTORS * VL;

static inline __m512bh as_pairs(__m512i v) {
  return (__m512bh)v;
}
// Two neighbouring elements, in every lane.
static inline __m512bh pair_at(const bf16* p) {
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  return as_pairs(_mm512_set1_epi32(pair));
}

// B is packed as [pairs][ldb][2]: the rows 2 p and 2 p + 1 of B interleaved. A's row r starts at A + r * row_stride.
template <int ROWS, int VECTORS>
static inline void pair_tile(int64_t pairs, const bf16* A, int64_t row_stride, const bf16* B, int64_t ldb,
                             vf (&sum)[ROWS][VECTORS]) {
#pragma GCC unroll 2
  for (int64_t p = 0; p < pairs; p++, A += 2, B += 2 * ldb) {
    __m512bh column[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) column[v] = as_pairs(_mm512_loadu_si512(B + 2 * v * VL));
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; r++) {
      __m512bh x = pair_at(A + r * row_stride);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[r][v] = (vf)_mm512_dpbf16_ps((__m512)sum[r][v], x, column[v]);
    }
  }
}

// Interleaves 32 columns of two rows: the pairs of the first 16 columns, and of the others.
static inline void interleave(__m512i even, __m512i odd, __m512i* first, __m512i* others) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                       37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  *first = _mm512_permutex2var_epi16(even, low, odd);
  *others = _mm512_permutex2var_epi16(even, high, odd);
}
static inline void interleave(__m512i even, __m512i odd, bf16* out) {
  __m512i first, others;
  interleave(even, odd, &first, &others);
  _mm512_storeu_si512(out, first);
  _mm512_storeu_si512(out + 32, others);
}

// Elements [i, i + 32) of a row of n, 0 beyond its end.
static inline __m512i load_half_row(const bf16* p, int64_t i, int64_t n) {
  if (i + 32 <= n) return _mm512_loadu_si512(p + i);
  return _mm512_maskz_loadu_epi16(n > i ? (__mmask32)((1ull << (n - i)) - 1) : 0, p + i);
}

// Columns [column, end) of `count` rows at(0), at(1), ...: panels of PAIR_COLUMNS, `panel_size` elements apart, each
// [pairs][PAIR_COLUMNS][2] and zero-filled; whole rows, as they lie.
template <class At>
static inline void interleave_rows(const At& at, int64_t count, int64_t column, int64_t end, int64_t panel_size,
                                   bf16* out) {
  for (int64_t i = 0; i < count; i += 2, out += 2 * PAIR_COLUMNS) {
    const bf16 *even = at(i), *odd = at(i + 1 < count ? i + 1 : i);
    bf16* panel = out;
    for (int64_t c = column; c < end; c += PAIR_COLUMNS, panel += panel_size)
      for (int64_t part = 0; part < PAIR_COLUMNS; part += 32) {
        __m512i upper = load_half_row(even, c + part, end);
        __m512i lower = i + 1 < count ? load_half_row(odd, c + part, end) : _mm512_setzero_si512();
        interleave(upper, lower, panel + 2 * part);
      }
  }
}

}  // namespace COSERVE_ISA
}  // namespace coserve
#endif
