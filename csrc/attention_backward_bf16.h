// Window attention's backward on dot products of pairs: the same tiles, chunks and orders as in fp32. Scores stand
// transposed (a key's row, queries in lanes), so that weights and slopes are factors as they lie.
#pragma once
#include "attention_bf16.h"

#if defined(__AVX512BF16__)
namespace coserve {
namespace COSERVE_ISA {

// One task's scratch; per head of the group 64 queries.
struct PairWork {
  float *dq_t;                       // [group, D, 64]
  float *delta, *lse;                // [group, 64]
  bf16 *q_t, *dout_t;                // [group, D / 2, 64, 2]
  bf16 *q, *dout;                    // [group, panels, 32, 64, 2]
  float *scores, *slopes;            // [64 keys, 64]
  bf16 *weights_h, *slopes_h;        // [group, 64 keys, 64]
  bf16 *slope_pairs;                 // [32, 64, 2]
  bf16 *keys_t, *key_pairs;          // [D, 64], [D / 2, 64, 2]
  int32_t *first, *last;             // keys that a query sees, [64], but for its gap; beyond the rows: none
  int32_t *gap, *gap_end;
  int32_t latest_first, earliest_last, first_gap, last_gap_end;
  int64_t panels_size;
};

static PairWork make_pair_work(const Backward& b) {
  int64_t square = KEY_BLOCK * KEY_BLOCK, rows = b.group * KEY_BLOCK, tile = KEY_BLOCK * b.D;
  int64_t panels = divide_up(b.D, PAIR_COLUMNS) * square;
  int64_t floats = rows * (b.D + 2) + 2 * square + 4 * KEY_BLOCK;
  int64_t halves = b.group * 2 * (tile + panels + square) + square + 2 * tile;
  float* p = (float*)scratch(0, floats * sizeof(float) + halves * sizeof(bf16));
  PairWork w{};
  w.panels_size = panels;
  w.dq_t = p, p += rows * b.D;
  w.delta = p, p += rows;
  w.lse = p, p += rows;
  w.scores = p, p += square;
  w.slopes = p, p += square;
  w.first = (int32_t*)p, p += KEY_BLOCK;
  w.last = (int32_t*)p, p += KEY_BLOCK;
  w.gap = (int32_t*)p, p += KEY_BLOCK;
  w.gap_end = (int32_t*)p, p += KEY_BLOCK;
  bf16* h = (bf16*)p;
  w.q_t = h, h += b.group * tile;
  w.dout_t = h, h += b.group * tile;
  w.q = h, h += b.group * panels;
  w.dout = h, h += b.group * panels;
  w.weights_h = h, h += b.group * square;
  w.slopes_h = h, h += b.group * square;
  w.slope_pairs = h, h += square;
  w.keys_t = h, h += tile;
  w.key_pairs = h;
  return w;
}

static void load_queries(const bf16*, const Backward& b, PairWork& w, int64_t kv_head, int64_t begin, int64_t end) {
  int64_t rows = end - begin, tile = KEY_BLOCK * b.D;
  for (int64_t r = 0; r < KEY_BLOCK; r++) {
    Sight sight = r < rows ? b.sight(begin + r) : Sight{INT32_MAX, -1, 0, 0};
    w.first[r] = (int32_t)sight.first;
    w.last[r] = (int32_t)sight.last;
    w.gap[r] = (int32_t)sight.gap;
    w.gap_end[r] = (int32_t)sight.gap_end;
    if (r == 0) w.first_gap = INT32_MAX, w.last_gap_end = 0;
    if (sight.gap < sight.gap_end) {
      if (w.gap[r] < w.first_gap) w.first_gap = w.gap[r];
      if (w.gap_end[r] > w.last_gap_end) w.last_gap_end = w.gap_end[r];
    }
    if (r == 0 || w.first[r] > w.latest_first) w.latest_first = w.first[r];
    if (r == 0 || w.last[r] < w.earliest_last) w.earliest_last = w.last[r];
  }
  for (int64_t g = 0; g < b.group; g++) {
    int64_t head = kv_head * b.group + g;
    auto at_q = [&](int64_t r) { return (const bf16*)b.q + (begin + r) * b.q_stride + head * b.D; };
    auto at_dout = [&](int64_t r) { return (const bf16*)b.dout + (begin + r) * b.dout_stride + head * b.D; };
    load_pairs_transposed(at_q, rows, b.D, w.q_t + g * tile);
    load_pairs_transposed(at_dout, rows, b.D, w.dout_t + g * tile);
    interleave_rows(at_q, rows, 0, b.D, KEY_BLOCK * PAIR_COLUMNS, w.q + g * w.panels_size);
    interleave_rows(at_dout, rows, 0, b.D, KEY_BLOCK * PAIR_COLUMNS, w.dout + g * w.panels_size);
    for (int64_t r = 0; r < KEY_BLOCK; r++) {
      const bf16* o = (const bf16*)b.o + (begin + r) * b.o_stride + head * b.D;
      vf sum{};
      for (int64_t d = 0; r < rows && d < b.D; d += VL) sum = fma(load(at_dout(r) + d), load(o + d), sum);
      w.delta[g * KEY_BLOCK + r] = reduce_add(sum);
      w.lse[g * KEY_BLOCK + r] = r < rows ? b.lse[(begin + r) * b.N + head] * LOG2_E : 0.0f;
    }
  }
}

// As softmax_slopes in fp32, for `count` keys from `key` on. WHOLE: every query sees them all.
template <bool CAPPED, bool WHOLE>
static void pair_slopes(const Backward& b, const PairWork& w, int64_t g, int64_t width, int64_t key, int64_t count) {
  const float *lse = w.lse + g * KEY_BLOCK, *delta = w.delta + g * KEY_BLOCK;
  bf16 *weights = w.weights_h + g * KEY_BLOCK * KEY_BLOCK, *slopes = w.slopes_h + g * KEY_BLOCK * KEY_BLOCK;
  const float turn = CAPPED ? b.scale / b.cap : 0, factor = (CAPPED ? b.cap : b.scale) * LOG2_E;
  for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 4
    for (int64_t r = 0; r < width; r += VL) {
      int64_t at = j * KEY_BLOCK + r;
      vf score = load(w.scores + at), slope = splat(b.scale);
      if constexpr (CAPPED) {
        score = vtanh(score * turn);
        slope = slope * (1.0f - score * score);
      }
      vf weight = vexp2<true>(fma(score, splat(factor), -load(lse + r)));
      if constexpr (!WHOLE) {
        vi first, last, gap, gap_end;
        memcpy(&first, w.first + r, sizeof first);
        memcpy(&last, w.last + r, sizeof last);
        memcpy(&gap, w.gap + r, sizeof gap);
        memcpy(&gap_end, w.gap_end + r, sizeof gap_end);
        int32_t position = (int32_t)(key + j);
        vi sees = (first <= position) & (last >= position) & ((gap > position) | (gap_end <= position));
        weight = sees ? weight : vf{};
      }
      store(weights + at, weight);
      store(slopes + at, weight * (load(w.slopes + at) - load(delta + r)) * slope);
    }
}

static void pair_slopes_of(const Backward& b, const PairWork& w, int64_t g, int64_t width, int64_t key, int64_t count) {
  bool whole = w.latest_first <= key && w.earliest_last >= key + count - 1 &&
               (key + count <= w.first_gap || key >= w.last_gap_end);
  if (b.cap == 0)
    (whole ? pair_slopes<false, true> : pair_slopes<false, false>)(b, w, g, width, key, count);
  else
    (whole ? pair_slopes<true, true> : pair_slopes<true, false>)(b, w, g, width, key, count);
}

// The sums over a group's heads and a tile's queries are one chain.
static void key_block(const bf16*, const Backward& b, const PairWork& w, int64_t kv_head, int64_t begin, int64_t rows,
                      int64_t block) {
  int64_t key = block * KEY_BLOCK, count = smaller(KEY_BLOCK, b.window_start + begin + rows - key);
  const bf16* k = (const bf16*)b.k + key * b.k_stride + kv_head * b.D;
  const bf16* v = (const bf16*)b.v + key * b.v_stride + kv_head * b.D;
  int64_t width = round_up(rows, VL), out = (key * b.Nkv + kv_head) * b.D, stride = b.Nkv * b.D;
  int64_t square = KEY_BLOCK * KEY_BLOCK, panel = KEY_BLOCK * PAIR_COLUMNS, tile = KEY_BLOCK * b.D;
  load_pairs_transposed([&](int64_t j) { return k + j * b.k_stride; }, count, b.D, w.key_pairs);
  split_pairs(w.key_pairs, b.D / 2, w.keys_t);
  for (int64_t g = 0; g < b.group; g++) {
    pair_product(count, width, {b.D / 2, k, b.k_stride, w.q_t + g * tile, KEY_BLOCK, w.scores, KEY_BLOCK, false});
    pair_product(count, width, {b.D / 2, v, b.v_stride, w.dout_t + g * tile, KEY_BLOCK, w.slopes, KEY_BLOCK, false});
    pair_slopes_of(b, w, g, width, key, count);
    const bf16* slopes = w.slopes_h + g * square;
    interleave_rows([&](int64_t j) { return slopes + j * KEY_BLOCK; }, count, 0, width, panel, w.slope_pairs);
    pair_product(b.D, width, {divide_up(count, 2), w.keys_t, KEY_BLOCK, w.slope_pairs, PAIR_COLUMNS, w.dq_t + g * tile,
                              KEY_BLOCK, true});
  }
  PairProduct dv{divide_up(rows, 2), w.weights_h, KEY_BLOCK, w.dout, PAIR_COLUMNS, b.dv + out, stride, true,
                 b.group, square, w.panels_size};
  PairProduct dk = dv;
  dk.A = w.slopes_h, dk.B = w.q, dk.C = b.dk + out;
  pair_products(count, b.D, panel, dv);
  pair_products(count, b.D, panel, dk);
}

static void clear_dq(const Backward& b, const PairWork& w) {
  memset(w.dq_t, 0, b.group * KEY_BLOCK * b.D * sizeof(float));
}

// dq of head g's queries as rows, [rows, D] a head's distance apart.
static void copy_dq(const Backward& b, const PairWork& w, int64_t g, int64_t rows, float* out, int64_t stride) {
  for (int64_t r = 0; r < rows; r += VL)
    for (int64_t d = 0; d < b.D; d += VL) {
      vf block[VL];
      for (int i = 0; i < VL; i++) block[i] = load(w.dq_t + (g * b.D + d + i) * KEY_BLOCK + r);
      transpose(block);
      for (int i = 0; i < VL && r + i < rows; i++) store(out + (r + i) * stride + d, block[i]);
    }
}

}  // namespace COSERVE_ISA
}  // namespace coserve
#endif
