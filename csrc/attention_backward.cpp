// Backward of window attention. A task owns one KV head and a chunk of keys, so dk and dv have one writer and
// a fixed order: query tiles anchored at stream index 0 from the last to the first, a tile's sum added at a
// time. dq of a tile is summed over its chunks in ascending order afterwards.
#include "attention.h"

namespace coserve {
namespace COSERVE_ISA {

struct Backward {
  const void *dout, *q, *o;
  int64_t dout_stride, q_stride, o_stride;
  const float* lse;
  const void *k, *v;
  int64_t k_stride, v_stride;
  const int32_t *first_key, *gaps;
  int64_t window_start, W, N, Nkv, group, D, Dp;
  float scale, cap;
  float *dk, *dv;
  void* dq;
  float* dq_parts;  // [chunk, W, N, Dp]

  Sight sight(int64_t token) const { return sight_of(first_key, gaps, window_start, token); }
};

}  // namespace COSERVE_ISA
}  // namespace coserve
#include "attention_backward_bf16.h"
namespace coserve {
namespace COSERVE_ISA {

// One task's scratch; per head of the group 64 rows.
struct Work {
  float *q, *dout, *dq;                       // [group, 64, Dp]
  float *delta, *lse;                         // [group, 64]
  float *weights, *slopes;                    // [64, 64]
  float *keys, *keys_t, *values_t, *partial;  // [64, Dp]
};

static Work make_work(const Backward& b) {
  int64_t rows = b.group * KEY_BLOCK, tile = KEY_BLOCK * b.Dp, square = KEY_BLOCK * KEY_BLOCK;
  float* p = (float*)scratch(0, (rows * (3 * b.Dp + 2) + 2 * square + 4 * tile) * sizeof(float));
  Work w{};
  w.q = p, p += rows * b.Dp;
  w.dout = p, p += rows * b.Dp;
  w.dq = p, p += rows * b.Dp;
  w.weights = p, p += square;
  w.slopes = p, p += square;
  w.keys = p, p += tile;
  w.keys_t = p, p += tile;
  w.values_t = p, p += tile;
  w.partial = p, p += tile;
  w.delta = p, p += rows;
  w.lse = p;
  return w;
}

// Rows [begin, end) of the window: queries, output gradients and delta = dout . o for all heads of the group.
template <class T>
static void load_queries(const T*, const Backward& b, const Work& w, int64_t kv_head, int64_t begin, int64_t end) {
  for (int64_t g = 0; g < b.group; g++) {
    int64_t head = kv_head * b.group + g, rows = end - begin, base = g * KEY_BLOCK;
    auto at = [&](const void* p, int64_t stride, int64_t r) {
      return (const T*)p + (begin + r) * stride + head * b.D;
    };
    load_rows([&](int64_t r) { return at(b.q, b.q_stride, r); }, rows, rows, b.D, 1.0f, w.q + base * b.Dp);
    load_rows([&](int64_t r) { return at(b.dout, b.dout_stride, r); }, rows, rows, b.D, 1.0f,
              w.dout + base * b.Dp);
    for (int64_t r = 0; r < rows; r++) {
      const T *dout = at(b.dout, b.dout_stride, r), *o = at(b.o, b.o_stride, r);
      vf sum{};
      for (int64_t d = 0; d < b.D; d += VL) sum = fma(load_at(dout, d, b.D), load_at(o, d, b.D), sum);
      w.delta[base + r] = reduce_add(sum);
      w.lse[base + r] = b.lse[(begin + r) * b.N + head];
    }
  }
}

// weights = p, slopes = scale * p * (dp - delta) for one head's rows against one key block; a capped score
// z = cap * tanh(u / cap) brings the factor 1 - (z / cap)^2.
template <bool CAPPED>
static void softmax_slopes(const Backward& b, const Work& w, int64_t g, int64_t begin, int64_t rows,
                           int64_t key) {
  for (int64_t r = 0; r < rows; r++) {
    float *p = w.weights + r * KEY_BLOCK, *ds = w.slopes + r * KEY_BLOCK;
    Sight sight = b.sight(begin + r);
    float lse = w.lse[g * KEY_BLOCK + r], delta = w.delta[g * KEY_BLOCK + r];
    for (int64_t j = 0; j < KEY_BLOCK; j += VL) {
      vf score = load(p + j) * b.scale, slope = splat(b.scale);
      if constexpr (CAPPED) {
        vf turned = vtanh(score / b.cap);
        score = b.cap * turned;
        slope = slope * (1.0f - turned * turned);
      }
      vf weight = vexp(score - lse);
      weight = sight.visible(key + j) ? weight : vf{};
      store(p + j, weight);
      store(ds + j, weight * (load(ds + j) - delta) * slope);
    }
  }
}

// target[j, kv_head] += sum over rows of left[row, j] * right[row] for `count` keys from `key` on.
static void add_key_gradient(const Backward& b, const Work& w, const float* left, const float* right,
                             int64_t rows, int64_t key, int64_t count, int64_t kv_head, float* target) {
  float* out = target + (key * b.Nkv + kv_head) * b.D;
  int64_t stride = b.Nkv * b.D;
  bool direct = b.D == b.Dp;
  matmul(count, b.Dp,
         {rows, left, 1, KEY_BLOCK, right, b.Dp, direct ? out : w.partial, direct ? stride : b.Dp,
          direct ? Into::ADD : Into::SET});
  if (direct) return;
  for (int64_t j = 0; j < count; j++)
    for (int64_t d = 0; d < b.D; d++) out[j * stride + d] += w.partial[j * b.Dp + d];
}

template <class T>
static void key_block(const T*, const Backward& b, const Work& w, int64_t kv_head, int64_t begin, int64_t rows,
                      int64_t block) {
  int64_t key = block * KEY_BLOCK, count = smaller(KEY_BLOCK, b.window_start + begin + rows - key);
  auto at_key = [&](int64_t j) { return (const T*)b.k + (key + j) * b.k_stride + kv_head * b.D; };
  auto at_value = [&](int64_t j) { return (const T*)b.v + (key + j) * b.v_stride + kv_head * b.D; };
  load_rows(at_key, count, KEY_BLOCK, b.D, 1.0f, w.keys);
  load_transposed(at_key, count, KEY_BLOCK, b.D, w.keys_t);
  load_transposed(at_value, count, KEY_BLOCK, b.D, w.values_t);
  for (int64_t g = 0; g < b.group; g++) {
    int64_t base = g * KEY_BLOCK * b.Dp;
    const float *q = w.q + base, *dout = w.dout + base;
    matmul(rows, KEY_BLOCK, {b.D, q, b.Dp, 1, w.keys_t, KEY_BLOCK, w.weights, KEY_BLOCK, Into::SET});
    matmul(rows, KEY_BLOCK, {b.D, dout, b.Dp, 1, w.values_t, KEY_BLOCK, w.slopes, KEY_BLOCK, Into::SET});
    if (b.cap == 0)
      softmax_slopes<false>(b, w, g, begin, rows, key);
    else
      softmax_slopes<true>(b, w, g, begin, rows, key);
    add_key_gradient(b, w, w.weights, dout, rows, key, count, kv_head, b.dv);
    add_key_gradient(b, w, w.slopes, q, rows, key, count, kv_head, b.dk);
    matmul(rows, b.Dp,
           {count, w.slopes, KEY_BLOCK, 1, w.keys, b.Dp, w.dq + base, b.Dp, Into::ADD});
  }
}

struct Span {
  int64_t begin, end, first_block, last_block;
};

// The window's rows of query tile `tile` and the key blocks that they see.
static Span tile_span(const Backward& b, int64_t tile) {
  Span s{};
  s.begin = larger(0, tile * KEY_BLOCK - b.window_start);
  s.end = smaller(b.W, (tile + 1) * KEY_BLOCK - b.window_start);
  int64_t first = b.first_key[s.begin];
  for (int64_t r = s.begin; r < s.end; r++) first = smaller(first, b.first_key[r]);
  s.first_block = first / KEY_BLOCK;
  s.last_block = (b.window_start + s.end - 1) / KEY_BLOCK;
  return s;
}

// No query of the tile sees a key of the block: it lies in all their gaps.
static bool unseen(const Backward& b, const Span& s, int64_t block) {
  for (int64_t r = s.begin; r < s.end; r++)
    if (!b.sight(r).none_of(block * KEY_BLOCK)) return false;
  return true;
}

static void clear_dq(const Backward& b, const Work& w) {
  memset(w.dq, 0, b.group * KEY_BLOCK * b.Dp * sizeof(float));
}

static void copy_dq(const Backward& b, const Work& w, int64_t g, int64_t rows, float* out, int64_t stride) {
  for (int64_t r = 0; r < rows; r++)
    memcpy(out + r * stride, w.dq + (g * KEY_BLOCK + r) * b.Dp, b.Dp * sizeof(float));
}

template <class T, class W>
static void chunk_tiles(const Backward& b, W w, int64_t kv_head, int64_t chunk, int64_t first_chunk) {
  int64_t first_tile = b.window_start / KEY_BLOCK, last_tile = (b.window_start + b.W - 1) / KEY_BLOCK;
  for (int64_t tile = last_tile; tile >= first_tile; tile--) {
    Span s = tile_span(b, tile);
    int64_t from = larger(s.first_block, chunk * CHUNK_BLOCKS);
    int64_t to = smaller(s.last_block, (chunk + 1) * CHUNK_BLOCKS - 1);
    if (from > to) continue;
    int64_t rows = s.end - s.begin;
    load_queries((const T*)b.q, b, w, kv_head, s.begin, s.end);
    clear_dq(b, w);
    for (int64_t block = from; block <= to; block++)
      if (!b.gaps || !unseen(b, s, block)) key_block((const T*)b.k, b, w, kv_head, s.begin, rows, block);
    for (int64_t g = 0; g < b.group; g++) {
      int64_t row = ((chunk - first_chunk) * b.W + s.begin) * b.N + kv_head * b.group + g;
      copy_dq(b, w, g, rows, b.dq_parts + row * b.Dp, b.N * b.Dp);
    }
  }
}

template <class T>
static void chunk_task(const Backward& b, int64_t kv_head, int64_t chunk, int64_t first_chunk) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(bf16))
    if (b.D % VL == 0) return chunk_tiles<T>(b, make_pair_work(b), kv_head, chunk, first_chunk);
#endif
  chunk_tiles<T>(b, make_work(b), kv_head, chunk, first_chunk);
}

// dq of one tile: the parts of its chunks, added in ascending order.
template <class T>
static void write_dq(const Backward& b, int64_t tile, int64_t first_chunk) {
  Span s = tile_span(b, tile);
  int64_t from = s.first_block / CHUNK_BLOCKS - first_chunk, to = s.last_block / CHUNK_BLOCKS - first_chunk;
  for (int64_t row = s.begin * b.N; row < s.end * b.N; row++)
    for (int64_t d = 0; d < b.D; d += VL) {
      vf sum = load(b.dq_parts + (from * b.W * b.N + row) * b.Dp + d);
      for (int64_t chunk = from + 1; chunk <= to; chunk++)
        sum += load(b.dq_parts + (chunk * b.W * b.N + row) * b.Dp + d);
      store_at((T*)b.dq + row * b.D, sum, d, b.D);
    }
}

template <class T>
static void run(Backward& b) {
  int64_t first = b.first_key[0];
  for (int64_t i = 0; i < b.W; i++) first = smaller(first, b.first_key[i]);
  int64_t first_chunk = first / (KEY_BLOCK * CHUNK_BLOCKS);
  int64_t chunks = (b.window_start + b.W - 1) / (KEY_BLOCK * CHUNK_BLOCKS) + 1 - first_chunk;
  b.dq_parts = (float*)scratch(1, chunks * b.W * b.N * b.Dp * sizeof(float));
  double work = 5.0 * b.W * (b.window_start + b.W - first) * b.N * b.D;
  parallel_for(chunks * b.Nkv, work, [&](int64_t task) {
    chunk_task<T>(b, task % b.Nkv, first_chunk + task / b.Nkv, first_chunk);
  });
  int64_t first_tile = b.window_start / KEY_BLOCK, last_tile = (b.window_start + b.W - 1) / KEY_BLOCK;
  parallel_for(last_tile + 1 - first_tile, (double)chunks * b.W * b.N * b.D,
               [&](int64_t i) { write_dq<T>(b, first_tile + i, first_chunk); });
}

static void window_attention_backward(int64_t dtype, const void* dout, int64_t dout_stride, const void* q,
                                      int64_t q_stride, const void* o, int64_t o_stride, const float* lse,
                                      const void* k, int64_t k_stride, const void* v, int64_t v_stride,
                                      const int32_t* first_key, const int32_t* gaps, int64_t window_start, int64_t W,
                                      int64_t N, int64_t Nkv, int64_t D, double scale, double cap, float* dk,
                                      float* dv, void* dq) {
  Backward b{dout, q,       o, dout_stride,         q_stride,     o_stride,   lse, k,  v,  k_stride, v_stride,
             first_key, gaps, window_start, W, N, Nkv, N / Nkv, D, round_up(D, D_STEP), (float)scale, (float)cap,
             dk,   dv,      dq, nullptr};
  if (W == 0) return;
  if (dtype == 0)
    run<float>(b);
  else
    run<bf16>(b);
}

void add_attention_backward(Kernels& table) {
  table.window_attention_backward = window_attention_backward;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
