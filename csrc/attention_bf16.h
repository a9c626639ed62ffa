// Attention's products in bf16 on dot products of pairs. Scores and their gradients are sums of exact products in
// fp32; weights (and their slopes) are rounded to bf16 where they are factors, as in torch's own bf16 attention.
#pragma once
#include "attention.h"
#include "tile_bf16.h"

namespace coserve {
namespace COSERVE_ISA {

#if defined(__AVX512BF16__)

struct PairProduct {
  int64_t pairs;
  const bf16* A;
  int64_t row_stride;
  const bf16* B;  // [pairs][ldb][2]
  int64_t ldb;
  float* C;
  int64_t ldc;
  bool add;  // to what C has
  int64_t parts = 1, A_part = 0, B_part = 0;  // a sum over as many such products, their factors so far apart
};

template <int ROWS, int VECTORS>
static inline void pair_block(const PairProduct& t) {
  vf sum[ROWS][VECTORS] = {};
  for (int64_t part = 0; part < t.parts; part++)
    pair_tile<ROWS, VECTORS>(t.pairs, t.A + part * t.A_part, t.row_stride, t.B + part * t.B_part, t.ldb, sum);
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      float* c = t.C + r * t.ldc + v * VL;
      store(c, t.add ? load(c) + sum[r][v] : sum[r][v]);
    }
}

template <int VECTORS>
static inline void pair_rows(int64_t rows, const PairProduct& args) {
  PairProduct t = args;
  for (int64_t m = 0; m < rows;) {
    int64_t left = divide_up(rows - m, PAIR_ROWS), height = divide_up(rows - m, left);
    t.A = args.A + m * args.row_stride;
    t.C = args.C + m * args.ldc;
    switch (height) {
      case 1: pair_block<1, VECTORS>(t); break;
      case 2: pair_block<2, VECTORS>(t); break;
      case 3: pair_block<3, VECTORS>(t); break;
      case 4: pair_block<4, VECTORS>(t); break;
      case 5: pair_block<5, VECTORS>(t); break;
      default: pair_block<6, VECTORS>(t);
    }
    m += height;
  }
}

// Any number of rows; `columns` a multiple of VL, at most PAIR_COLUMNS.
static inline void pair_product(int64_t rows, int64_t columns, const PairProduct& t) {
  switch (columns / VL) {
    case 1: return pair_rows<1>(rows, t);
    case 2: return pair_rows<2>(rows, t);
    case 3: return pair_rows<3>(rows, t);
    case 4: return pair_rows<4>(rows, t);
  }
}

// The same with B in panels of PAIR_COLUMNS columns, `panel_size` apart, as interleave_rows leaves them.
static inline void pair_products(int64_t rows, int64_t columns, int64_t panel_size, const PairProduct& args) {
  PairProduct t = args;
  for (int64_t n = 0; n < columns; n += PAIR_COLUMNS, t.B += panel_size, t.C += PAIR_COLUMNS)
    pair_product(rows, smaller(PAIR_COLUMNS, columns - n), t);
}

// out[2 * pairs][KEY_BLOCK] = the rows of a matrix that `in` [pairs][KEY_BLOCK][2] holds in pairs.
static inline void split_pairs(const bf16* in, int64_t pairs, bf16* out) {
  const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                        22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  for (int64_t p = 0; p < pairs; p++, in += 2 * KEY_BLOCK, out += 2 * KEY_BLOCK)
    for (int64_t j = 0; j < KEY_BLOCK; j += 32) {
      __m512i first = _mm512_loadu_si512(in + 2 * j), others = _mm512_loadu_si512(in + 2 * j + 32);
      _mm512_storeu_si512(out + j, _mm512_permutex2var_epi16(first, even, others));
      _mm512_storeu_si512(out + KEY_BLOCK + j, _mm512_permutex2var_epi16(first, odd, others));
    }
}

// out[D / 2][KEY_BLOCK][2] = the transpose of `count` rows at(0), at(1), ... of D elements, D a multiple of VL; zeros
// up to the next VL rows.
template <class At>
static void load_pairs_transposed(const At& at, int64_t count, int64_t D, bf16* out) {
  for (int64_t j = 0; j < count; j += VL)
    for (int64_t d = 0; d < D; d += 2 * VL) {
      vf rows[VL];
      for (int i = 0; i < VL; i++) rows[i] = j + i < count ? (vf)load_half_row(at(j + i), d, D) : vf{};
      transpose(rows);
      for (int i = 0; i < VL && d + 2 * i < D; i++) memcpy(out + ((d / 2 + i) * KEY_BLOCK + j) * 2, rows + i, 64);
    }
}

#endif

}  // namespace COSERVE_ISA
}  // namespace coserve
