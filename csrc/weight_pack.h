// The one copy of a base matrix W [N, K]: panels of 16 rows of W, each [depth][16] words of 32 bits, zero-filled.
// fp32: a word is an element and the depth is K. bf16: a word is the pair of elements (2 p, 2 p + 1) of a row and
// the depth is K / 2, rounded up to 16 words: 64 bytes serve a dot product of pairs, 1024 are a tile of AMX.
#pragma once
#include "parallel.h"
#include "simd.h"

namespace coserve {
namespace COSERVE_ISA {

constexpr int64_t PANEL = 16;

template <class T>
struct PackOf;
template <>
struct PackOf<float> {
  static constexpr int64_t WORD = 1;  // elements
  static int64_t depth(int64_t K) { return K; }
};
template <>
struct PackOf<bf16> {
  static constexpr int64_t WORD = 2;
  static int64_t depth(int64_t K) { return round_up(divide_up(K, 2), 16); }
};

// Elements of a panel.
template <class T>
static inline int64_t panel_size(int64_t K) {
  return PackOf<T>::depth(K) * PANEL * PackOf<T>::WORD;
}

// out[j][i] = in[i][j] for 16 x 16 words, `in`'s rows and `out`'s rows 16 words long.
static inline void transpose_words(const float* in, float* out) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(in + 16 * i);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  // Lane l of a[4 g + j]: column 4 l + j of the rows 4 g ... 4 g + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m512i upper02 = _mm512_shuffle_i64x2(a[j], a[4 + j], 0x88), upper13 = _mm512_shuffle_i64x2(a[j], a[4 + j], 0xdd);
    __m512i lower02 = _mm512_shuffle_i64x2(a[8 + j], a[12 + j], 0x88);
    __m512i lower13 = _mm512_shuffle_i64x2(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_si512(out + 16 * j, _mm512_shuffle_i64x2(upper02, lower02, 0x88));
    _mm512_storeu_si512(out + 16 * (j + 8), _mm512_shuffle_i64x2(upper02, lower02, 0xdd));
    _mm512_storeu_si512(out + 16 * (j + 4), _mm512_shuffle_i64x2(upper13, lower13, 0x88));
    _mm512_storeu_si512(out + 16 * (j + 12), _mm512_shuffle_i64x2(upper13, lower13, 0xdd));
  }
#else
  for (int j = 0; j < 16; j++)
    for (int i = 0; i < 16; i++) out[16 * j + i] = in[16 * i + j];
#endif
}

// 8 words deep of a panel, [8 pairs of k][16 n][2], to [8 pairs of n][16 k][2].
static inline void transpose_pairs(const bf16* in, bf16* out) {
#if defined(__AVX512BW__)
  // Of rows r and r + 1, the even quarters of 4 n by turns, (n, n + 1) of one k side by side; then the odd ones.
  const __m512i even = _mm512_set_epi16(59, 57, 58, 56, 27, 25, 26, 24, 51, 49, 50, 48, 19, 17, 18, 16, 43, 41, 42, 40,
                                        11, 9, 10, 8, 35, 33, 34, 32, 3, 1, 2, 0);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(4));
  __m512i a[2][4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++) {
    __m512i first = _mm512_loadu_si512(in + 64 * r), second = _mm512_loadu_si512(in + 64 * r + 32);
    a[0][r] = _mm512_permutex2var_epi16(first, even, second);
    a[1][r] = _mm512_permutex2var_epi16(first, odd, second);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; j++) {
    __m512i upper02 = _mm512_shuffle_i64x2(a[j][0], a[j][1], 0x88);
    __m512i upper13 = _mm512_shuffle_i64x2(a[j][0], a[j][1], 0xdd);
    __m512i lower02 = _mm512_shuffle_i64x2(a[j][2], a[j][3], 0x88);
    __m512i lower13 = _mm512_shuffle_i64x2(a[j][2], a[j][3], 0xdd);
    _mm512_storeu_si512(out + 32 * j, _mm512_shuffle_i64x2(upper02, lower02, 0x88));
    _mm512_storeu_si512(out + 32 * (j + 4), _mm512_shuffle_i64x2(upper02, lower02, 0xdd));
    _mm512_storeu_si512(out + 32 * (j + 2), _mm512_shuffle_i64x2(upper13, lower13, 0x88));
    _mm512_storeu_si512(out + 32 * (j + 6), _mm512_shuffle_i64x2(upper13, lower13, 0xdd));
  }
#else
  for (int j = 0; j < 8; j++)
    for (int k = 0; k < 16; k++)
      for (int i = 0; i < 2; i++) out[32 * j + 2 * k + i] = in[32 * (k / 2) + 2 * (2 * j + i) + k % 2];
#endif
}

}  // namespace COSERVE_ISA
}  // namespace coserve
