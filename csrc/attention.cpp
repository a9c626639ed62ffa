// Forward attention, paged and over training windows: one online softmax over blocks of 64 keys anchored at
// key 0. A row's arithmetic touches only its own scores, so it does not depend on the tile it stands in.
#include "attention_bf16.h"

extern "C" float logf(float);

namespace coserve {
namespace COSERVE_ISA {

constexpr int64_t TILE_QUERIES = 128;  // query rows (tokens x heads of a group) that share a block's load

// A tile's rows: queries of one KV head, ordered token-major, with the keys [first, last] each one sees.
struct Tile {
  int64_t rows, D, Dp;
  float *q, *o, *scores, *keys, *values;
  bf16* factors;  // q [rows, D], then weights [rows, KEY_BLOCK], where the products run on pairs; else null
  float scale;    // of the scores; 1 where q has it already
  float cap;      // scores are cap * tanh(score / cap); 0: as they are
  float *top, *total;
  int64_t *first, *last;
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
  t.scale = pairs ? scale : 1.0f;
  t.cap = cap;
  t.Dp = round_up(D, D_STEP);
  int64_t value_width = larger(t.Dp, 32);  // room for a panel of pairs
  int64_t floats = TILE_QUERIES * (2 * t.Dp + KEY_BLOCK + 2) + KEY_BLOCK * (t.Dp + value_width);
  float* p = (float*)scratch(0, floats * 4 + TILE_QUERIES * 16);
  t.q = p, p += TILE_QUERIES * t.Dp;
  if (pairs) t.factors = (bf16*)scratch(2, TILE_QUERIES * (D + KEY_BLOCK) * sizeof(bf16));
  t.o = p, p += TILE_QUERIES * t.Dp;
  t.scores = p, p += TILE_QUERIES * KEY_BLOCK;
  t.keys = p, p += KEY_BLOCK * t.Dp;
  t.values = p, p += KEY_BLOCK * value_width;
  t.top = p, p += TILE_QUERIES;
  t.total = p, p += TILE_QUERIES;
  t.first = (int64_t*)p;
  t.last = t.first + TILE_QUERIES;
  return t;
}

// Turns a row's scores of one block into weights and brings its running sums up to date.
template <bool CAPPED, bool PAIRS>
static void softmax_row(const Tile& t, int64_t row, int64_t block) {
  float* s = t.scores + row * KEY_BLOCK;
  bf16* weights = PAIRS ? t.factors + TILE_QUERIES * t.D + row * KEY_BLOCK : nullptr;
  int64_t key = block * KEY_BLOCK;
  if (t.last[row] < key || t.first[row] >= key + KEY_BLOCK) {
    memset(s, 0, KEY_BLOCK * sizeof(float));
    if (PAIRS) memset(weights, 0, KEY_BLOCK * sizeof(bf16));
    return;
  }
  const vf hidden = splat(-__builtin_inff());
  vf top = hidden;
  for (int64_t j = 0; j < KEY_BLOCK; j += VL) {
    vf score = PAIRS ? load(s + j) * t.scale : load(s + j);
    if constexpr (CAPPED) score = t.cap * vtanh(score / t.cap);
    vf v = visible(key + j, t.first[row], t.last[row]) ? score : hidden;
    store(s + j, v);
    top = vmax(v, top);
  }
  float before = t.top[row], now = reduce_max(top);
  if (now > before) {
    float shrink = exp1(before - now);  // 0 for the first block
    t.top[row] = now;
    t.total[row] *= shrink;
    for (int64_t d = 0; d < t.Dp; d += VL) store(t.o + row * t.Dp + d, load(t.o + row * t.Dp + d) * shrink);
  }
  vf sum{};
  for (int64_t j = 0; j < KEY_BLOCK; j += VL) {
    vf p = vexp(load(s + j) - t.top[row]);
    if (PAIRS)
      store(weights + j, p);
    else
      store(s + j, p);
    sum += p;
  }
  t.total[row] += reduce_add(sum);
}

template <bool PAIRS>
static void softmax_rows(const Tile& t, int64_t block) {
  if (t.cap == 0)
    for (int64_t r = 0; r < t.rows; r++) softmax_row<false, PAIRS>(t, r, block);
  else
    for (int64_t r = 0; r < t.rows; r++) softmax_row<true, PAIRS>(t, r, block);
}

#if defined(__AVX512BF16__)
// One block of `count` keys, its products on pairs.
template <class AtKey, class AtValue>
static void attend_block_on_pairs(const Tile& t, int64_t block, int64_t count, const AtKey& at_key,
                                  const AtValue& at_value) {
  int64_t panel = KEY_BLOCK * PAIR_COLUMNS;
  bf16 *keys = (bf16*)t.keys, *values = (bf16*)t.values;
  const bf16* weights = t.factors + TILE_QUERIES * t.D;
  load_pairs_transposed(at_key, count, t.D, keys);
  pair_product(t.rows, round_up(count, VL), {t.D / 2, t.factors, t.D, keys, KEY_BLOCK, t.scores, KEY_BLOCK, false});
  softmax_rows<true>(t, block);
  interleave_rows(at_value, count, 0, t.D, panel, values);
  pair_products(t.rows, t.D, panel,
                {divide_up(count, 2), weights, KEY_BLOCK, values, PAIR_COLUMNS, t.o, t.Dp, true});
}
#endif

// at_key(j), at_value(j): the row of key j. Leaves o unnormalised.
template <class T, class AtKey, class AtValue>
static void attend(const Tile& t, const AtKey& at_key, const AtValue& at_value) {
  int64_t first = t.first[0], last = t.last[0];
  for (int64_t r = 0; r < t.rows; r++) {
    first = smaller(first, t.first[r]);
    last = larger(last, t.last[r]);
    t.top[r] = -__builtin_inff();
    t.total[r] = 0;
  }
  memset(t.o, 0, t.rows * t.Dp * sizeof(float));
  for (int64_t block = first / KEY_BLOCK; block <= last / KEY_BLOCK; block++) {
    int64_t key = block * KEY_BLOCK, count = smaller(KEY_BLOCK, last + 1 - key);
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == sizeof(bf16))
      if (t.factors) {
        attend_block_on_pairs(
            t, block, count, [&](int64_t j) { return at_key(key + j); }, [&](int64_t j) { return at_value(key + j); });
        continue;
      }
#endif
    load_transposed([&](int64_t j) { return at_key(key + j); }, count, count, t.D, t.keys);
    load_rows([&](int64_t j) { return at_value(key + j); }, count, count, t.D, 1.0f, t.values);
    matmul(t.rows, round_up(count, D_STEP),
           {t.D, t.q, t.Dp, 1, t.keys, KEY_BLOCK, t.scores, KEY_BLOCK, Into::SET});
    softmax_rows<false>(t, block);
    matmul(t.rows, t.Dp, {count, t.scores, KEY_BLOCK, 1, t.values, t.Dp, t.o, t.Dp, Into::RESUME});
  }
}

// The heads of one group for tokens [begin, end): loads q, calls attend, writes o (and lse, if asked).
template <class T>
struct Heads {
  const T* q;
  int64_t q_stride;
  T* o;
  float* lse;
  int64_t N, group, D;
  float scale, cap;

  void load_queries(Tile& t, int64_t begin, int64_t end, int64_t kv_head) const {
    t.rows = (end - begin) * group;
    auto at = [&](int64_t r) { return q + (begin + r / group) * q_stride + (kv_head * group + r % group) * D; };
    if (t.factors)
      for (int64_t r = 0; r < t.rows; r++) memcpy(t.factors + r * D, at(r), D * sizeof(bf16));
    else
      load_rows(at, t.rows, t.rows, D, scale, t.q);
  }
  void write(const Tile& t, int64_t begin, int64_t kv_head) const {
    for (int64_t r = 0; r < t.rows; r++) {
      int64_t head = (begin + r / group) * N + kv_head * group + r % group;
      float inverse = 1.0f / t.total[r];
      for (int64_t d = 0; d < D; d += VL) store_at(o + head * D, load(t.o + r * t.Dp + d) * inverse, d, D);
      if (lse) lse[head] = t.top[r] + logf(t.total[r]);
    }
  }
};

static int64_t tile_tokens(int64_t group) {
  return larger(1, TILE_QUERIES / group);
}

struct Paged {
  const void *k, *v;
  int64_t k_block_stride, v_block_stride, block_size;
  const int32_t* tables;
  int64_t table_stride;
  const int32_t *query_start, *context_lens;
  int64_t window;  // keys that a query sees, its own among them; 0: all
};

template <class T>
static void paged_tile(const Heads<T>& heads, const Paged& cache, int64_t Nkv, int64_t s, int64_t token,
                       int64_t kv_head) {
  int64_t end = smaller(cache.query_start[s + 1], token + tile_tokens(heads.group)), D = heads.D;
  Tile t = make_tile(D, heads.scale, heads.cap, on_pairs<T>(D));
  heads.load_queries(t, token, end, kv_head);
  int64_t position = cache.context_lens[s] - (cache.query_start[s + 1] - token);
  for (int64_t r = 0; r < t.rows; r++) {
    t.last[r] = position + r / heads.group;
    t.first[r] = cache.window ? larger(0, t.last[r] + 1 - cache.window) : 0;
  }
  const int32_t* table = cache.tables + s * cache.table_stride;
  auto at = [&](const void* base, int64_t block_stride, int64_t j) {
    int64_t offset = j % cache.block_size;
    return (const T*)base + table[j / cache.block_size] * block_stride + (offset * Nkv + kv_head) * D;
  };
  attend<T>(
      t, [&](int64_t j) { return at(cache.k, cache.k_block_stride, j); },
      [&](int64_t j) { return at(cache.v, cache.v_block_stride, j); });
  heads.write(t, token, kv_head);
}

template <class T>
static void paged(const Heads<T>& heads, const Paged& cache, int64_t S, int64_t Nkv) {
  int64_t step = tile_tokens(heads.group), tiles = 0;
  double work = 0;
  for (int64_t s = 0; s < S; s++) {
    int64_t queries = cache.query_start[s + 1] - cache.query_start[s];
    tiles += divide_up(queries, step);
    int64_t seen = cache.context_lens[s];
    if (cache.window) seen = smaller(seen, queries + cache.window);
    work += 2.0 * queries * seen * heads.N * heads.D;
  }
  struct Place {
    int32_t sequence, token;
  };
  Place* places = (Place*)scratch(1, tiles * sizeof(Place) + 1);
  int64_t n = 0;
  for (int64_t s = 0; s < S; s++)
    for (int64_t token = cache.query_start[s]; token < cache.query_start[s + 1]; token += step)
      places[n++] = {(int32_t)s, (int32_t)token};
  parallel_for(tiles * Nkv, work, [&](int64_t task) {
    Place place = places[task / Nkv];
    paged_tile(heads, cache, Nkv, place.sequence, place.token, task % Nkv);
  });
}

static void paged_attention(int64_t dtype, const void* q, int64_t q_stride, const void* k, const void* v,
                            int64_t k_block_stride, int64_t v_block_stride, int64_t block_size,
                            const int32_t* tables, int64_t table_stride, const int32_t* query_start,
                            const int32_t* context_lens, int64_t S, int64_t N, int64_t Nkv, int64_t D,
                            double scale, int64_t window, double cap, void* o) {
  Paged cache{k,      v,            k_block_stride, v_block_stride, block_size,
              tables, table_stride, query_start,    context_lens,   window};
  float by = (float)scale, c = (float)cap;
  if (dtype == 0)
    paged(Heads<float>{(const float*)q, q_stride, (float*)o, nullptr, N, N / Nkv, D, by, c}, cache, S, Nkv);
  else
    paged(Heads<bf16>{(const bf16*)q, q_stride, (bf16*)o, nullptr, N, N / Nkv, D, by, c}, cache, S, Nkv);
}

struct Stream {
  const void *k, *v;
  int64_t k_stride, v_stride;
  const int32_t* first_key;
  int64_t window_start;
};

template <class T>
static void window(const Heads<T>& heads, const Stream& stream, int64_t W, int64_t Nkv) {
  int64_t step = tile_tokens(heads.group), tiles = divide_up(W, step), D = heads.D;
  double work = 2.0 * W * (stream.window_start + W) * heads.N * D;
  parallel_for(tiles * Nkv, work, [&](int64_t task) {
    int64_t kv_head = task % Nkv, begin = (tiles - 1 - task / Nkv) * step;  // the longest first
    Tile t = make_tile(D, heads.scale, heads.cap, on_pairs<T>(D));
    heads.load_queries(t, begin, smaller(W, begin + step), kv_head);
    for (int64_t r = 0; r < t.rows; r++) {
      int64_t token = begin + r / heads.group;
      t.first[r] = stream.first_key[token];
      t.last[r] = stream.window_start + token;
    }
    attend<T>(
        t, [&](int64_t j) { return (const T*)stream.k + j * stream.k_stride + kv_head * D; },
        [&](int64_t j) { return (const T*)stream.v + j * stream.v_stride + kv_head * D; });
    heads.write(t, begin, kv_head);
  });
}

static void window_attention(int64_t dtype, const void* q, int64_t q_stride, const void* k, int64_t k_stride,
                             const void* v, int64_t v_stride, const int32_t* first_key,
                             int64_t window_start, int64_t W, int64_t N, int64_t Nkv, int64_t D, double scale,
                             double cap, void* o, float* lse) {
  Stream stream{k, v, k_stride, v_stride, first_key, window_start};
  float by = (float)scale, c = (float)cap;
  if (dtype == 0)
    window(Heads<float>{(const float*)q, q_stride, (float*)o, lse, N, N / Nkv, D, by, c}, stream, W, Nkv);
  else
    window(Heads<bf16>{(const bf16*)q, q_stride, (bf16*)o, lse, N, N / Nkv, D, by, c}, stream, W, Nkv);
}

void add_attention(Kernels& table) {
  table.paged_attention = paged_attention;
  table.window_attention = window_attention;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
