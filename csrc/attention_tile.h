// Forward attention of one tile: rows (queries of one KV head) against blocks of 64 keys anchored at key 0, an online
// softmax over the blocks of a chunk of 512 keys, and the chunks merged in ascending order. A row's arithmetic is
// the same chain of operations whatever the tile, and wherever its chunks were computed.
#pragma once
#include "attention_bf16.h"
#include "attention_few.h"

namespace coserve {
namespace COSERVE_ISA {

constexpr int64_t TILE_QUERIES = 128;  // query rows (tokens x heads of a group) that share a block's load

constexpr float SLACK = 8.0f;  // weights may reach 2^SLACK before a row's sums are scaled down again

// Running sums of a tile's rows: o [rows, Dp], the weights' total by lanes [rows, VL], and the exponent of two that
// both are taken relative to, near that of the largest score.
struct Sums {
  float *o, *total, *top;
};

static inline int64_t sums_floats(int64_t rows, int64_t Dp) {
  return rows * (Dp + VL + 1);
}
static inline Sums sums_at(float* p, int64_t rows, int64_t Dp) {
  return {p, p + rows * Dp, p + rows * (Dp + VL)};
}
static inline void clear(const Sums& s, int64_t rows, int64_t Dp) {
  memset(s.o, 0, rows * Dp * sizeof(float));
  memset(s.total, 0, rows * VL * sizeof(float));
  for (int64_t r = 0; r < rows; r++) s.top[r] = -__builtin_inff();
}
static inline float total_of(const Sums& s, int64_t row) {
  return reduce_add(load(s.total + row * VL));
}

// Rows ordered token-major, with the keys that each one sees.
struct Tile {
  int64_t rows, D, Dp;
  bool pairs;
  float factor, cap, turn;  // exponents are factor * score, or factor * tanh(turn * score) where there is a cap
  Sums sums, chunk;
  float *q, *scores, *keys, *values;
  bf16 *q_pairs, *weights;  // [rows, D], [rows, KEY_BLOCK], where the products run on pairs
  Sight* sights;
};

// Whether queries of type T run on pairs.
template <class T>
static bool on_pairs(int64_t D) {
#if defined(__AVX512BF16__)
  return sizeof(T) == sizeof(bf16) && D % VL == 0;
#else
  (void)D;
  return false;
#endif
}

static Tile make_tile(int64_t D, float scale, float cap, bool pairs) {
  Tile t{};
  t.D = D;
  t.pairs = pairs;
  t.cap = cap;
  t.turn = cap > 0 ? scale / cap : 0;
  t.factor = (cap > 0 ? cap : scale) * LOG2_E;
  t.Dp = round_up(D, D_STEP);
  int64_t value_width = larger(t.Dp, 32);  // room for a panel of pairs
  int64_t sums = sums_floats(TILE_QUERIES, t.Dp);
  int64_t floats = 2 * sums + TILE_QUERIES * (t.Dp + KEY_BLOCK) + KEY_BLOCK * (t.Dp + value_width);
  int64_t halves = pairs ? TILE_QUERIES * (D + KEY_BLOCK) : 0;
  float* p = (float*)scratch(0, floats * 4 + halves * 2 + TILE_QUERIES * sizeof(Sight));
  t.sums = sums_at(p, TILE_QUERIES, t.Dp), p += sums;
  t.chunk = sums_at(p, TILE_QUERIES, t.Dp), p += sums;
  t.q = p, p += TILE_QUERIES * t.Dp;
  t.scores = p, p += TILE_QUERIES * KEY_BLOCK;
  t.keys = p, p += KEY_BLOCK * t.Dp;
  t.values = p, p += KEY_BLOCK * value_width;
  t.sights = (Sight*)p;
  t.q_pairs = (bf16*)(t.sights + TILE_QUERIES);
  t.weights = t.q_pairs + TILE_QUERIES * D;
  return t;
}

// Scales a row's sums down to the exponent of its largest score.
static __attribute__((noinline)) void raise_top(const Tile& t, int64_t row, float top) {
  float shrink = exp2_1(t.chunk.top[row] - top);  // 0 for the chunk's first block
  float *o = t.chunk.o + row * t.Dp, *total = t.chunk.total + row * VL;
  t.chunk.top[row] = top;
  store(total, load(total) * shrink);
  for (int64_t d = 0; d < t.Dp; d += VL) store(o + d, load(o + d) * shrink);
}

// Turns a row's scores of one block into weights and brings its running sums up to date.
template <bool CAPPED, bool PAIRS, bool WHOLE>
static inline void softmax_block(const Tile& t, int64_t row, int64_t key) {
  constexpr int VECTORS = KEY_BLOCK / VL;
  float *s = t.scores + row * KEY_BLOCK, *total = t.chunk.total + row * VL;
  vf exponent[VECTORS], highest = splat(-__builtin_inff());
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; i++) {
    vf score = load(s + i * VL);
    if constexpr (CAPPED) score = vtanh(score * t.turn);
    exponent[i] = score * t.factor;
    if constexpr (!WHOLE)
      exponent[i] = t.sights[row].visible(key + i * VL) ? exponent[i] : splat(-1e30f);
    highest = vmax(exponent[i], highest);
  }
  if (any_above(highest, t.chunk.top[row] + SLACK)) raise_top(t, row, reduce_max(highest));
  vf sum = load(total), top = splat(t.chunk.top[row]);
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; i++) {
    vf p = vexp2<PAIRS>(exponent[i] - top);
    if constexpr (PAIRS)
      store(t.weights + row * KEY_BLOCK + i * VL, p);
    else
      store(s + i * VL, p);
    sum += p;
  }
  store(total, sum);
}

template <bool CAPPED, bool PAIRS>
static void softmax_rows(const Tile& t, int64_t from, int64_t to, int64_t key) {
  for (int64_t r = from; r < to; r++) {
    if (t.sights[r].none_of(key)) {
      memset(t.scores + r * KEY_BLOCK, 0, KEY_BLOCK * sizeof(float));
      if (PAIRS) memset(t.weights + r * KEY_BLOCK, 0, KEY_BLOCK * sizeof(bf16));
    } else if (t.sights[r].all_of(key)) {
      softmax_block<CAPPED, PAIRS, true>(t, r, key);
    } else {
      softmax_block<CAPPED, PAIRS, false>(t, r, key);
    }
  }
}

template <bool PAIRS>
static void softmax(const Tile& t, int64_t from, int64_t to, int64_t key) {
  if (t.cap > 0)
    softmax_rows<true, PAIRS>(t, from, to, key);
  else
    softmax_rows<false, PAIRS>(t, from, to, key);
}

// Rows [from, to) against `count` keys from `key` on; few of them ask for the `next` keys on the way.
template <class T>
static void attend_block(const Tile& t, int64_t from, int64_t to, int64_t key, int64_t count, const Pointers<T>& at,
                         const Next<T>& next) {
  int64_t rows = to - from;
  auto at_key = [&](int64_t j) { return at.keys[j]; };
  auto at_value = [&](int64_t j) { return at.values[j]; };
  float *scores = t.scores + from * KEY_BLOCK, *o = t.chunk.o + from * t.Dp;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(bf16))
    if (t.pairs) {
      const bf16 *q = t.q_pairs + from * t.D, *weights = t.weights + from * KEY_BLOCK;
      if (rows <= FEW_ROWS) {
        few_pair_scores(rows, q, t.D, at.keys, count, scores, next);
        softmax<true>(t, from, to, key);
        return few_pair_outputs(rows, weights, at.values, count, t.D, o, t.Dp, next);
      }
      int64_t panel = KEY_BLOCK * PAIR_COLUMNS;
      bf16 *keys = (bf16*)t.keys, *values = (bf16*)t.values;
      load_pairs_transposed(at_key, count, t.D, keys);
      pair_product(rows, round_up(count, VL), {t.D / 2, q, t.D, keys, KEY_BLOCK, scores, KEY_BLOCK, false});
      softmax<true>(t, from, to, key);
      interleave_rows(at_value, count, 0, t.D, panel, values);
      return pair_products(rows, t.D, panel,
                           {divide_up(count, 2), weights, KEY_BLOCK, values, PAIR_COLUMNS, o, t.Dp, true});
    }
#endif
  const float* q = t.q + from * t.Dp;
  if (rows <= FEW_ROWS) {
    few_scores(rows, q, t.D, t.Dp, at.keys, count, scores, next);
    softmax<false>(t, from, to, key);
    return few_outputs(rows, scores, at.values, count, t.D, t.Dp, o, next);
  }
  load_transposed(at_key, count, count, t.D, t.keys);
  matmul(rows, round_up(count, D_STEP), {t.D, q, t.Dp, 1, t.keys, KEY_BLOCK, scores, KEY_BLOCK, Into::SET});
  softmax<false>(t, from, to, key);
  load_rows(at_value, count, count, t.D, 1.0f, t.values);
  matmul(rows, t.Dp, {count, scores, KEY_BLOCK, 1, t.values, t.Dp, o, t.Dp, Into::RESUME});
}

// Adds a chunk's sums of one row to those of the chunks before it.
static inline void merge_row(const Sums& into, const Sums& chunk, int64_t row, int64_t Dp) {
  float before = into.top[row], now = chunk.top[row];
  if (now == -__builtin_inff()) return;  // the row sees nothing of the chunk
  float top = now > before ? now : before, keep = exp2_1(before - top), add = exp2_1(now - top);
  auto merge = [&](float* sum, const float* part) { store(sum, fma(load(part), splat(add), load(sum) * keep)); };
  into.top[row] = top;
  merge(into.total + row * VL, chunk.total + row * VL);
  for (int64_t d = 0; d < Dp; d += VL) merge(into.o + row * Dp + d, chunk.o + row * Dp + d);
}

// The sums of one chunk into t.chunk. locate(key, count, at) finds the rows of keys and values, follow(next) those that
// this thread will likely read after `limit`.
template <class T, class Locate, class Follow>
static void attend_chunk(const Tile& t, int64_t chunk, int64_t first, int64_t last, int64_t limit,
                         const Locate& locate, const Follow& follow) {
  clear(t.chunk, t.rows, t.Dp);
  int64_t begin = larger(first / KEY_BLOCK, chunk * CHUNK_BLOCKS) * KEY_BLOCK;
  int64_t end = smaller(last + 1, (chunk + 1) * CHUNK_BLOCKS * KEY_BLOCK);
  Next<T> blocks[2];
  auto find = [&](int64_t key, int64_t beyond, Next<T>& block) {
    block.count = smaller(KEY_BLOCK, beyond - key);
    locate(key, block.count, block.at);
  };
  find(begin, end, blocks[0]);
  for (int64_t key = begin, turn = 0; key < end; key += KEY_BLOCK, turn ^= 1) {
    Next<T>&now = blocks[turn], &next = blocks[turn ^ 1];
    if (key + KEY_BLOCK < limit)
      find(key + KEY_BLOCK, limit, next);
    else
      follow(next);
    int64_t from = 0, to = t.rows;
    while (from < to && t.sights[from].none_of(key)) from++;
    while (from < to && t.sights[to - 1].none_of(key)) to--;
    if (to - from > FEW_ROWS) {
      next.fetch_keys(0, next.count, t.D);
      next.fetch_values(0, next.count, t.D);
    }
    if (from < to) attend_block(t, from, to, key, now.count, now.at, next);
  }
}

struct Reach {
  int64_t first, last;
};

// The keys that any row sees.
static Reach reach(const Tile& t) {
  Reach r{t.sights[0].first, t.sights[0].last};
  for (int64_t i = 1; i < t.rows; i++) {
    r.first = smaller(r.first, t.sights[i].first);
    r.last = larger(r.last, t.sights[i].last);
  }
  return r;
}

// All of a tile's chunks into t.sums.
template <class T, class Locate, class Follow>
static void attend(const Tile& t, const Locate& locate, const Follow& follow) {
  Reach keys = reach(t);
  clear(t.sums, t.rows, t.Dp);
  for (int64_t chunk = keys.first / CHUNK_KEYS; chunk <= keys.last / CHUNK_KEYS; chunk++) {
    attend_chunk<T>(t, chunk, keys.first, keys.last, keys.last + 1, locate, follow);
    for (int64_t r = 0; r < t.rows; r++) merge_row(t.sums, t.chunk, r, t.Dp);
  }
}

}  // namespace COSERVE_ISA
}  // namespace coserve
