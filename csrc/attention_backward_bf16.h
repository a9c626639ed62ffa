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
  float *weights, *slopes;           // [64 keys, 64]
  bf16 *weights_h, *slopes_h;        // the same, rounded
  bf16 *slope_pairs, *keys_t;        // [32, 64, 2], [D, 64]
  int64_t panels_size;
};

static PairWork make_pair_work(const Backward& b) {
  int64_t square = KEY_BLOCK * KEY_BLOCK, rows = b.group * KEY_BLOCK, tile = KEY_BLOCK * b.D;
  int64_t panels = divide_up(b.D, PAIR_COLUMNS) * square;
  int64_t floats = rows * (b.D + 2) + 2 * square;
  int64_t halves = b.group * 2 * (tile + panels) + 3 * square + tile;
  float* p = (float*)scratch(0, floats * sizeof(float) + halves * sizeof(bf16));
  PairWork w{};
  w.panels_size = panels;
  w.dq_t = p, p += rows * b.D;
  w.delta = p, p += rows;
  w.lse = p, p += rows;
  w.weights = p, p += square;
  w.slopes = p, p += square;
  bf16* h = (bf16*)p;
  w.q_t = h, h += b.group * tile;
  w.dout_t = h, h += b.group * tile;
  w.q = h, h += b.group * panels;
  w.dout = h, h += b.group * panels;
  w.weights_h = h, h += square;
  w.slopes_h = h, h += square;
  w.slope_pairs = h, h += square;
  w.keys_t = h;
  return w;
}

static void load_queries(const bf16*, const Backward& b, const PairWork& w, int64_t kv_head, int64_t begin, int64_t end) {
  int64_t rows = end - begin, tile = KEY_BLOCK * b.D;
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
      w.lse[g * KEY_BLOCK + r] = r < rows ? b.lse[(begin + r) * b.N + head] : 0.0f;
    }
  }
}

// As softmax_slopes in fp32, for `count` keys from `key` on; queries beyond `rows` get 0.
template <bool CAPPED>
static void pair_slopes(const Backward& b, const PairWork& w, int64_t g, int64_t begin, int64_t rows, int64_t key,
                        int64_t count) {
  const float *lse = w.lse + g * KEY_BLOCK, *delta = w.delta + g * KEY_BLOCK;
  int32_t first[KEY_BLOCK] = {};
  for (int64_t r = 0; r < rows; r++) first[r] = b.first_key[begin + r];
  for (int64_t j = 0; j < count; j++)
    for (int64_t r = 0; r < round_up(rows, VL); r += VL) {
      int64_t at = j * KEY_BLOCK + r;
      vf score = load(w.weights + at) * b.scale, slope = splat(b.scale);
      if constexpr (CAPPED) {
        vf turned = vtanh(score / b.cap);
        score = b.cap * turned;
        slope = slope * (1.0f - turned * turned);
      }
      vi query = LANE + (int32_t)r, low;
      memcpy(&low, first + r, sizeof low);
      int32_t position = (int32_t)(key + j);
      vi sees = (query < (int32_t)rows) & (query + (int32_t)(b.window_start + begin) >= position) & (low <= position);
      vf weight = sees ? vexp(score - load(lse + r)) : vf{};
      store(w.weights_h + at, weight);
      store(w.slopes_h + at, weight * (load(w.slopes + at) - load(delta + r)) * slope);
    }
}

static void key_block(const bf16*, const Backward& b, const PairWork& w, int64_t kv_head, int64_t begin, int64_t rows,
                      int64_t block) {
  int64_t key = block * KEY_BLOCK, count = smaller(KEY_BLOCK, b.window_start + begin + rows - key);
  const bf16* k = (const bf16*)b.k + key * b.k_stride + kv_head * b.D;
  const bf16* v = (const bf16*)b.v + key * b.v_stride + kv_head * b.D;
  int64_t width = round_up(rows, VL), out = (key * b.Nkv + kv_head) * b.D, stride = b.Nkv * b.D;
  int64_t panel = KEY_BLOCK * PAIR_COLUMNS, tile = KEY_BLOCK * b.D;
  for (int64_t j = 0; j < round_up(count, 2); j++)
    for (int64_t d = 0; d < b.D; d++) w.keys_t[d * KEY_BLOCK + j] = j < count ? k[j * b.k_stride + d] : bf16{0};
  for (int64_t g = 0; g < b.group; g++) {
    pair_product(count, width, {b.D / 2, k, b.k_stride, w.q_t + g * tile, KEY_BLOCK, w.weights, KEY_BLOCK, false});
    pair_product(count, width, {b.D / 2, v, b.v_stride, w.dout_t + g * tile, KEY_BLOCK, w.slopes, KEY_BLOCK, false});
    if (b.cap == 0)
      pair_slopes<false>(b, w, g, begin, rows, key, count);
    else
      pair_slopes<true>(b, w, g, begin, rows, key, count);
    int64_t pairs = divide_up(rows, 2);
    pair_products(count, b.D, panel, {pairs, w.weights_h, KEY_BLOCK, w.dout + g * w.panels_size, PAIR_COLUMNS,
                                      b.dv + out, stride, true});
    pair_products(count, b.D, panel,
                  {pairs, w.slopes_h, KEY_BLOCK, w.q + g * w.panels_size, PAIR_COLUMNS, b.dk + out, stride, true});
    interleave_rows([&](int64_t j) { return w.slopes_h + j * KEY_BLOCK; }, count, 0, width, panel, w.slope_pairs);
    pair_product(b.D, width, {divide_up(count, 2), w.keys_t, KEY_BLOCK, w.slope_pairs, PAIR_COLUMNS, w.dq_t + g * tile,
                              KEY_BLOCK, true});
  }
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
