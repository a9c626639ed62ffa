// LoRA's parts in bf16 on dot products of pairs. h and dh are summed in fp32. As factors of y and dx, which are bf16,
// they are rounded to bf16; as factors of dA and dB, which are fp32, they are split into two bf16 (x = high + low to
// 2^-17), so that both halves of a product run on pairs.
#pragma once
#include "tile_bf16.h"

namespace coserve {
namespace COSERVE_ISA {

// Rows of a product over tokens: `rank` of them from `first` on of its factor, added to `out`'s rows.
struct Sums {
  int64_t first, rank;
  float* out;
  int64_t stride;
};

#if defined(__AVX512BF16__)

// Lane i of the result is the sum of sums[i]'s lanes, in a fixed tree.
template <int STEP>
static inline void fold(vf* sums) {
  vi lane;
  for (int i = 0; i < VL; i++) lane[i] = i;
  const vi low = (lane & STEP) ? lane - STEP + VL : lane, high = (lane & STEP) ? lane + VL : lane + STEP;
#pragma GCC unroll 8
  for (int i = 0; i < VL / STEP / 2; i++)
    sums[i] = __builtin_shuffle(sums[2 * i], sums[2 * i + 1], low) +
              __builtin_shuffle(sums[2 * i], sums[2 * i + 1], high);
}

// h[t, i] = x[t] . a[i] for TOKENS tokens x 16 / TOKENS rows; `ahead` rows lie further on and are fetched.
template <int TOKENS>
static inline void pair_dots(const bf16* x, int64_t x_stride, const bf16* const* a, int64_t K, float* h,
                             int64_t h_stride, int64_t tokens, int64_t ranks, int64_t ahead) {
  constexpr int RANKS = 16 / TOKENS;
  const bf16 *from[TOKENS], *weight[RANKS], *next[RANKS];
  for (int t = 0; t < TOKENS; t++) from[t] = x + smaller(t, tokens - 1) * x_stride;  // what is missing repeats
  for (int i = 0; i < RANKS; i++) {
    weight[i] = a[smaller(i, ranks - 1)];
    next[i] = a[smaller(i + RANKS, ahead - 1)];
  }
  vf sum[16] = {};
  for (int64_t k = 0; k < K; k += 32) {
    __m512bh v[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) v[t] = as_pairs(load_half_row(from[t], k, K));
#pragma GCC unroll 16
    for (int i = 0; i < RANKS; i++) {
      __m512bh w = as_pairs(load_half_row(weight[i], k, K));
      _mm_prefetch((const char*)(next[i] + k), _MM_HINT_T0);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; t++) sum[RANKS * t + i] = (vf)_mm512_dpbf16_ps((__m512)sum[RANKS * t + i], v[t], w);
    }
  }
  fold<1>(sum);
  fold<2>(sum);
  fold<4>(sum);
  fold<8>(sum);
  float dots[16];
  store(dots, sum[0]);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t i = 0; i < ranks; i++) h[t * h_stride + i] = dots[RANKS * t + i];
}

template <int TOKENS>
static void dots_of_rows(const bf16* x, int64_t x_stride, int64_t tokens, const bf16* const* a, int64_t rank,
                         int64_t K, float* h, int64_t h_stride) {
  constexpr int64_t RANKS = 16 / TOKENS;
  for (int64_t i = 0; i < rank; i += RANKS)
    pair_dots<TOKENS>(x, x_stride, a + i, K, h + i, h_stride, tokens, smaller(RANKS, rank - i), rank - i);
}

static void project_down(const bf16* x, int64_t x_stride, int64_t tokens, const bf16* const* a, int64_t rank,
                         int64_t K, float* h, int64_t h_stride) {
  for (int64_t t = 0; t < tokens;) {
    const bf16* from = x + t * x_stride;
    float* to = h + t * h_stride;
    int64_t count = smaller(4, tokens - t);
    switch (count) {
      case 1: dots_of_rows<1>(from, x_stride, 1, a, rank, K, to, h_stride); break;
      case 2: dots_of_rows<2>(from, x_stride, 2, a, rank, K, to, h_stride); break;
      default: dots_of_rows<4>(from, x_stride, count, a, rank, K, to, h_stride);
    }
    t += count;
  }
}

// v = high + low to 2^-17.
static inline void halves(vf v, __m256i* high, __m256i* low) {
  bf16 upper[VL];
  store(upper, v);
  memcpy(high, upper, sizeof *high);
  *low = (__m256i)_mm512_cvtneps_pbh((__m512)(v - load(upper)));
}

// Lane 2 i of the result is dword i of a's lower half (upper half for UPPER), lane 2 i + 1 that of b.
template <int UPPER>
static inline __m512i alternate(__m512i a, __m512i b) {
  const int o = 8 * UPPER;
  const __m512i lanes = _mm512_setr_epi32(o, 16 + o, o + 1, 17 + o, o + 2, 18 + o, o + 3, 19 + o, o + 4, 20 + o, o + 5,
                                          21 + o, o + 6, 22 + o, o + 7, 23 + o);
  return _mm512_permutex2var_epi32(a, lanes, b);
}

// Factors of products over ranks, whose results are bf16 themselves: [tokens][width], zeros up to `width` ranks (a
// multiple of 16).
static void round_rows(const float* values, int64_t stride, int64_t tokens, int64_t rank, int64_t width, bf16* out) {
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t i = 0; i < width; i += VL)
      store(out + t * width + i, i < rank ? load_at(values + t * stride, i, rank) : vf{});
}

// Factors of products over tokens, whose results are fp32: [pairs of tokens][ranks][high, high, low, low], `width` ranks.
static void split_columns(const float* values, int64_t stride, int64_t tokens, int64_t rank, int64_t width, bf16* out) {
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t t = 0; t < tokens; t += 2)
    for (int64_t i = 0; i < width; i += VL, out += 4 * VL) {
      const float* row = values + t * stride;
      bool some = i < rank;
      __m256i high[2], low[2];
      halves(some ? load_at(row, i, rank) : vf{}, high, low);
      halves(some && t + 1 < tokens ? load_at(row + stride, i, rank) : vf{}, high + 1, low + 1);
      auto both = [&](const __m256i* half) {
        return _mm512_permutexvar_epi16(pairs, _mm512_inserti64x4(_mm512_zextsi256_si512(half[0]), half[1], 1));
      };
      __m512i upper = both(high), lower = both(low);
      _mm512_storeu_si512(out, alternate<0>(upper, lower));
      _mm512_storeu_si512(out + 2 * VL, alternate<1>(upper, lower));
    }
}

// Where a factor's pair p of row r lies: at + r * row_step + p * pair_step; of two HALVES high before low.
struct Factor {
  const bf16* at;
  int64_t row_step, pair_step;
};

// y[r, c] += factor[r] . panel[:, c], each sum one chain over the pairs.
template <int ROWS, int HALVES, class Y>
static inline void add_product(int64_t pairs, Factor f, const bf16* panel, Y* y, int64_t y_stride, int64_t columns) {
  vf sum[ROWS][PAIR_VECTORS] = {};
  for (int64_t p = 0; p < pairs; p++, panel += 2 * PAIR_COLUMNS, f.at += f.pair_step) {
    __m512bh column[PAIR_VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < PAIR_VECTORS; v++) column[v] = as_pairs(_mm512_loadu_si512(panel + 2 * v * VL));
#pragma GCC unroll 2
    for (int half = 0; half < HALVES; half++)
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++) {
        __m512bh x = pair_at(f.at + r * f.row_step + 2 * half);
#pragma GCC unroll 4
        for (int v = 0; v < PAIR_VECTORS; v++) sum[r][v] = (vf)_mm512_dpbf16_ps((__m512)sum[r][v], x, column[v]);
      }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < PAIR_VECTORS; v++)
      if (v * VL < columns) {
        Y* row = y + r * y_stride;
        store_at(row, load_at(row, v * VL, columns) + sum[r][v], v * VL, columns);
      }
}

// The same over all panels of `columns` columns, a few rows at a time.
template <int HALVES, class Y>
static void add_products(int64_t rows, int64_t pairs, const Factor& factor, const bf16* panels, Y* y, int64_t y_stride,
                         int64_t columns) {
  for (int64_t m = 0; m < rows;) {
    int64_t left = divide_up(rows - m, PAIR_ROWS), height = divide_up(rows - m, left);
    Factor f{factor.at + m * factor.row_step, factor.row_step, factor.pair_step};
    const bf16* panel = panels;
    for (int64_t c = 0; c < columns; c += PAIR_COLUMNS, panel += 2 * pairs * PAIR_COLUMNS) {
      Y* out = y + m * y_stride + c;
      switch (height) {
        case 1: add_product<1, HALVES>(pairs, f, panel, out, y_stride, columns - c); break;
        case 2: add_product<2, HALVES>(pairs, f, panel, out, y_stride, columns - c); break;
        case 3: add_product<3, HALVES>(pairs, f, panel, out, y_stride, columns - c); break;
        case 4: add_product<4, HALVES>(pairs, f, panel, out, y_stride, columns - c); break;
        case 5: add_product<5, HALVES>(pairs, f, panel, out, y_stride, columns - c); break;
        default: add_product<6, HALVES>(pairs, f, panel, out, y_stride, columns - c);
      }
    }
    m += height;
  }
}

constexpr int64_t GROUP_COLUMNS = 4 * PAIR_COLUMNS;  // interleaved at a time, so that rows are read in long runs
constexpr int64_t STREAMED_COLUMNS = 512;            // sums of those kept in the L1 cache

// sums[t, c] (zero where `fresh`) += factor[t] . rows, some pairs of rows, the columns [0, columns) of them; the
// same columns of the rows `next` are fetched.
template <int TOKENS>
static inline void stream_rows(float* sums, bool fresh, const bf16* factor, int64_t token_step, const bf16* const* rows,
                               int64_t count, const bf16* const* next, int64_t columns) {
  for (int64_t c = 0; c < columns; c += 32) {
    vf sum[TOKENS][2];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) sum[t][v] = fresh ? vf{} : load(sums + t * STREAMED_COLUMNS + c + v * VL);
    for (int64_t i = 0; i < count; i += 2) {
      __m512i upper = load_half_row(rows[i], c, columns);
      __m512i lower = i + 1 < count ? load_half_row(rows[i + 1], c, columns) : _mm512_setzero_si512();
      _mm_prefetch((const char*)(next[i] + c), _MM_HINT_T0);
      _mm_prefetch((const char*)(next[i + 1] + c), _MM_HINT_T0);
      __m512i first, others;
      interleave(upper, lower, &first, &others);
      const __m512bh column[2] = {as_pairs(first), as_pairs(others)};
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; t++) {
        __m512bh x = pair_at(factor + t * token_step + i);
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) sum[t][v] = (vf)_mm512_dpbf16_ps((__m512)sum[t][v], x, column[v]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) store(sums + t * STREAMED_COLUMNS + c + v * VL, sum[t][v]);
  }
}

// Few tokens: rows of b stream through, eight at a time; the same sums as add_products makes.
template <int TOKENS, class Y>
static void stream_up(Y* y, int64_t y_stride, const bf16* factor, int64_t width, const bf16* const* b, int64_t rank,
                      int64_t column, int64_t end) {
  constexpr int64_t ROWS = 8;
  alignas(64) float sums[TOKENS * STREAMED_COLUMNS];
  for (int64_t n = column; n < end; n += STREAMED_COLUMNS) {
    int64_t columns = smaller(STREAMED_COLUMNS, end - n);
    for (int64_t i = 0; i < rank; i += ROWS) {
      const bf16 *rows[ROWS], *next[ROWS];
      for (int64_t j = 0; j < ROWS; j++) {
        rows[j] = b[smaller(i + j, rank - 1)] + n;
        bool last = i + ROWS >= rank;
        next[j] = last ? b[smaller(j, rank - 1)] + n + columns : b[smaller(i + ROWS + j, rank - 1)] + n;
      }
      stream_rows<TOKENS>(sums, i == 0, factor + i, width, rows, smaller(ROWS, rank - i), next, columns);
    }
    for (int64_t t = 0; t < TOKENS; t++)
      for (int64_t c = 0; c < columns; c += VL) {
        Y* row = y + t * y_stride + n;
        store_at(row, load_at(row, c, columns) + load(sums + t * STREAMED_COLUMNS + c), c, columns);
      }
  }
}

// y[t, c] += sum over i of h[t, i] * b[i][c] for the columns [column, end).
template <class Y>
static void project_up(Y* y, int64_t y_stride, int64_t tokens, const float* h, int64_t h_stride, const bf16* const* b,
                       int64_t rank, int64_t column, int64_t end) {
  int64_t width = round_up(rank, 16), pairs = divide_up(rank, 2);
  bf16* factor = (bf16*)scratch(2, (tokens * width + GROUP_COLUMNS * 2 * pairs) * sizeof(bf16));
  bf16* panels = factor + tokens * width;
  round_rows(h, h_stride, tokens, rank, width, factor);
  switch (tokens) {
    case 1: return stream_up<1>(y, y_stride, factor, width, b, rank, column, end);
    case 2: return stream_up<2>(y, y_stride, factor, width, b, rank, column, end);
    case 3: return stream_up<3>(y, y_stride, factor, width, b, rank, column, end);
    case 4: return stream_up<4>(y, y_stride, factor, width, b, rank, column, end);
    case 5: return stream_up<5>(y, y_stride, factor, width, b, rank, column, end);
    case 6: return stream_up<6>(y, y_stride, factor, width, b, rank, column, end);
    case 7: return stream_up<7>(y, y_stride, factor, width, b, rank, column, end);
    case 8: return stream_up<8>(y, y_stride, factor, width, b, rank, column, end);
  }
  for (int64_t n = column; n < end; n += GROUP_COLUMNS) {
    int64_t stop = smaller(end, n + GROUP_COLUMNS);
    interleave_rows([&](int64_t i) { return b[i]; }, rank, n, stop, 2 * pairs * PAIR_COLUMNS, panels);
    add_products<1>(tokens, pairs, {factor, width, 2}, panels, y + n, y_stride, stop - n);
  }
}

// As its fp32 form, for one tile of tokens.
static void token_sums(const float* left, int64_t left_stride, int64_t rank, const Sums* parts, int64_t count,
                       const bf16* right, int64_t right_stride, int64_t tokens, int64_t column, int64_t end_column) {
  int64_t width = round_up(rank, 16), pairs = divide_up(tokens, 2);
  bf16* factor = (bf16*)scratch(0, (4 * width + 2 * GROUP_COLUMNS) * pairs * sizeof(bf16));
  bf16* panels = factor + 4 * width * pairs;
  split_columns(left, left_stride, tokens, rank, width, factor);
  for (int64_t c = column; c < end_column; c += GROUP_COLUMNS) {
    int64_t end = smaller(end_column, c + GROUP_COLUMNS);
    interleave_rows([&](int64_t t) { return right + t * right_stride; }, tokens, c, end, 2 * pairs * PAIR_COLUMNS,
                    panels);
    for (const Sums* p = parts; p < parts + count; p++)
      add_products<2>(p->rank, pairs, {factor + 4 * p->first, 4, 4 * width}, panels, p->out + c, p->stride, end - c);
  }
}

#endif

}  // namespace COSERVE_ISA
}  // namespace coserve
