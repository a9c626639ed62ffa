// LoRA's parts in bf16 on dot products of pairs. h and dh stay fp32 where they are summed; where they are factors
// they are split into two bf16 (x = high + low to 2^-17), so that both halves of a product run on pairs.
#pragma once
#include "tile_bf16.h"

#if defined(__AVX512BF16__)
namespace coserve {
namespace COSERVE_ISA {

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

// h[t, i] = x[t] . a[rows[i]] for 4 tokens x 4 ranks.
static inline void pair_dots(const bf16* x, int64_t x_stride, const bf16* a, const int32_t* rows, int64_t K, float* h,
                             int64_t h_stride, int64_t tokens, int64_t ranks) {
  const bf16 *from[4], *weight[4];
  for (int i = 0; i < 4; i++) {  // what is missing repeats the last one
    from[i] = x + smaller(i, tokens - 1) * x_stride;
    weight[i] = a + rows[smaller(i, ranks - 1)] * K;
  }
  vf sum[16] = {};
  for (int64_t k = 0; k < K; k += 32) {
    __m512bh w[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) w[i] = as_pairs(load_half_row(weight[i], k, K));
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
      __m512bh v = as_pairs(load_half_row(from[t], k, K));
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) sum[4 * t + i] = (vf)_mm512_dpbf16_ps((__m512)sum[4 * t + i], v, w[i]);
    }
  }
  fold<1>(sum);
  fold<2>(sum);
  fold<4>(sum);
  fold<8>(sum);
  float dots[16];
  store(dots, sum[0]);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t i = 0; i < ranks; i++) h[t * h_stride + i] = dots[4 * t + i];
}

static void project_down(const bf16* x, int64_t x_stride, int64_t tokens, const bf16* a, const int32_t* rows,
                         int64_t rank, int64_t K, float* h) {
  for (int64_t t = 0; t < tokens; t += 4)
    for (int64_t i = 0; i < rank; i += 4)
      pair_dots(x + t * x_stride, x_stride, a, rows + i, K, h + t * rank + i, rank, smaller(4, tokens - t),
                smaller(4, rank - i));
}

// Element i of row t of `values` [tokens, rank] into high and low at t * token_step + i * rank_step; zeros up to
// the next even token and rank.
static void split(const float* values, int64_t tokens, int64_t rank, bf16* high, bf16* low, int64_t token_step,
                  int64_t rank_step) {
  int64_t width = rank_step == 1 ? round_up(rank, 2) : rank, height = token_step == 1 ? round_up(tokens, 2) : tokens;
  for (int64_t t = 0; t < height; t++)
    for (int64_t i = 0; i < width; i += VL) {
      vf v = t < tokens && i < rank ? load_at(values + t * rank, i, rank) : vf{};
      bf16 upper[VL], lower[VL];
      store(upper, v);
      store(lower, v - load(upper));
      bf16 *h = high + t * token_step + i * rank_step, *l = low + t * token_step + i * rank_step;
      int64_t count = smaller(VL, width - i);
      for (int64_t j = 0; j < count; j++) {
        h[j * rank_step] = upper[j];
        l[j * rank_step] = lower[j];
      }
    }
}

// y[r, c] += (high + low)[r] . panel[:, c]; the factors' rows are `stride` apart.
template <int ROWS, class Y>
static inline void add_product(int64_t pairs, const bf16* high, const bf16* low, int64_t stride, const bf16* panel,
                               Y* y, int64_t y_stride, int64_t columns) {
  vf sum[ROWS][PAIR_VECTORS] = {};
  pair_tile<ROWS, PAIR_VECTORS>(pairs, high, stride, panel, PAIR_COLUMNS, sum);
  pair_tile<ROWS, PAIR_VECTORS>(pairs, low, stride, panel, PAIR_COLUMNS, sum);
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
template <class Y>
static void add_products(int64_t rows, int64_t pairs, const bf16* high, const bf16* low, int64_t stride,
                         const bf16* panels, Y* y, int64_t y_stride, int64_t columns) {
  for (int64_t m = 0; m < rows;) {
    int64_t left = divide_up(rows - m, PAIR_ROWS), height = divide_up(rows - m, left);
    const bf16 *h = high + m * stride, *l = low + m * stride, *panel = panels;
    for (int64_t c = 0; c < columns; c += PAIR_COLUMNS, panel += 2 * pairs * PAIR_COLUMNS) {
      Y* out = y + m * y_stride + c;
      switch (height) {
        case 1: add_product<1>(pairs, h, l, stride, panel, out, y_stride, columns - c); break;
        case 2: add_product<2>(pairs, h, l, stride, panel, out, y_stride, columns - c); break;
        case 3: add_product<3>(pairs, h, l, stride, panel, out, y_stride, columns - c); break;
        case 4: add_product<4>(pairs, h, l, stride, panel, out, y_stride, columns - c); break;
        case 5: add_product<5>(pairs, h, l, stride, panel, out, y_stride, columns - c); break;
        default: add_product<6>(pairs, h, l, stride, panel, out, y_stride, columns - c);
      }
    }
    m += height;
  }
}

constexpr int64_t GROUP_COLUMNS = 4 * PAIR_COLUMNS;  // interleaved at a time, so that rows are read in long runs

template <class Y>
static void project_up(Y* y, int64_t y_stride, int64_t tokens, const float* h, const bf16* b, const int32_t* rows,
                       int64_t rank, int64_t N) {
  int64_t width = round_up(rank, 2);
  bf16* high = (bf16*)scratch(2, (2 * tokens + GROUP_COLUMNS) * width * sizeof(bf16));
  bf16 *low = high + tokens * width, *panels = low + tokens * width;
  split(h, tokens, rank, high, low, width, 1);
  for (int64_t n = 0; n < N; n += GROUP_COLUMNS) {
    int64_t end = smaller(N, n + GROUP_COLUMNS);
    interleave_rows([&](int64_t i) { return b + rows[i] * N; }, rank, n, end, width * PAIR_COLUMNS, panels);
    add_products(tokens, width / 2, high, low, width, panels, y + n, y_stride, end - n);
  }
}

// As its fp32 form: out[i, c] += sum over the tile's tokens of left[t, i] * right[t, c], tiles last to first.
static void token_sums(const float* left, int64_t rank, const bf16* right, int64_t right_stride, int64_t tokens,
                       int64_t token_offset, int64_t tile_tokens, int64_t column, int64_t end_column, int64_t columns,
                       float* out) {
  bf16* high = (bf16*)scratch(0, (2 * rank + GROUP_COLUMNS) * tile_tokens * sizeof(bf16));
  bf16 *low = high + rank * tile_tokens, *panels = low + rank * tile_tokens;
  int64_t first_tile = token_offset / tile_tokens;
  for (int64_t tile = (token_offset + tokens - 1) / tile_tokens; tile >= first_tile; tile--) {
    int64_t begin = larger(0, tile * tile_tokens - token_offset);
    int64_t count = smaller(tokens, (tile + 1) * tile_tokens - token_offset) - begin;
    split(left + begin * rank, count, rank, high, low, 1, tile_tokens);
    for (int64_t c = column; c < end_column; c += GROUP_COLUMNS) {
      int64_t end = smaller(end_column, c + GROUP_COLUMNS), pairs = divide_up(count, 2);
      interleave_rows([&](int64_t t) { return right + (begin + t) * right_stride; }, count, c, end,
                      2 * pairs * PAIR_COLUMNS, panels);
      add_products(rank, pairs, high, low, tile_tokens, panels, out + c, columns, end - c);
    }
  }
}

}  // namespace COSERVE_ISA
}  // namespace coserve
#endif
