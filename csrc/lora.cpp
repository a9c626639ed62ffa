// LoRA on a batch that mixes adapters, and its backward for one adapter. h = x a^T and dh = dy b^T are dot
// products over contiguous rows: VL partial sums over ascending elements, reduced in a fixed tree, so a
// token's h depends on nothing else in the batch. With dropout x is what its mask keeps, and the factor
// 1 / (1 - rate) goes into h and dh.
#include "dropout.h"
#include "lora_bf16.h"
#include "parallel.h"
#include "tile.h"

namespace coserve {
namespace COSERVE_ISA {

constexpr int64_t TOKEN_TILE = 64;   // tiles of the sums over tokens, anchored at the microbatch's start
#if defined(__AVX512BF16__)
constexpr int64_t FORWARD_TILE = 32;  // tokens of a forward task; B is interleaved once for them
#else
constexpr int64_t FORWARD_TILE = 16;
#endif

#if defined(__AVX512F__)
constexpr int DOT_TOKENS = 4, DOT_RANKS = 4;
#else
constexpr int DOT_TOKENS = 2, DOT_RANKS = 4;
#endif

// h[t, i] = x[t] . a[rows[i]] for TOKENS x RANKS of them.
template <int TOKENS, int RANKS, class T>
static void dots(const T* x, int64_t x_stride, const T* a, const int32_t* rows, int64_t K, float* h,
                 int64_t h_stride) {
  vf sum[TOKENS][RANKS] = {};
  const T* weight[RANKS];
  for (int i = 0; i < RANKS; i++) weight[i] = a + rows[i] * K;
  int64_t k = 0;
  for (; k + VL <= K; k += VL) {
    vf w[RANKS];
#pragma GCC unroll 8
    for (int i = 0; i < RANKS; i++) w[i] = load(weight[i] + k);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      vf v = load(x + t * x_stride + k);
#pragma GCC unroll 8
      for (int i = 0; i < RANKS; i++) sum[t][i] = fma(v, w[i], sum[t][i]);
    }
  }
  if (k < K)
    for (int t = 0; t < TOKENS; t++)
      for (int i = 0; i < RANKS; i++)
        sum[t][i] = fma(load_n(x + t * x_stride + k, K - k), load_n(weight[i] + k, K - k), sum[t][i]);
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 8
    for (int i = 0; i < RANKS; i++) h[t * h_stride + i] = reduce_add(sum[t][i]);
}

template <class T>
static void project_down(const T* x, int64_t x_stride, int64_t tokens, const T* a, const int32_t* rows,
                         int64_t rank, int64_t K, float* h) {
  for (int64_t t = 0; t < tokens;) {
    bool wide = tokens - t >= DOT_TOKENS;
    for (int64_t i = 0; i < rank;) {
      const T* from = x + t * x_stride;
      float* to = h + t * rank + i;
      bool full = rank - i >= DOT_RANKS;
      if (wide && full) dots<DOT_TOKENS, DOT_RANKS>(from, x_stride, a, rows + i, K, to, rank);
      if (wide && !full) dots<DOT_TOKENS, 1>(from, x_stride, a, rows + i, K, to, rank);
      if (!wide && full) dots<1, DOT_RANKS>(from, x_stride, a, rows + i, K, to, rank);
      if (!wide && !full) dots<1, 1>(from, x_stride, a, rows + i, K, to, rank);
      i += full ? DOT_RANKS : 1;
    }
    t += wide ? DOT_TOKENS : 1;
  }
}

// y[t] += sum over i of h[t, i] * b[rows[i]] for TOKENS tokens and `vectors` vectors of columns.
template <int TOKENS, int VECTORS, class Y, class T>
static void expand_tile(Y* y, int64_t y_stride, const float* h, const T* b, const int32_t* rows,
                        int64_t rank, int64_t N, int64_t n) {
  vf sum[TOKENS][VECTORS] = {};
  for (int64_t i = 0; i < rank; i++) {
    const T* weight = b + rows[i] * N;
    vf w[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) w[v] = VECTORS == 1 ? load_at(weight, n, N) : load(weight + n + v * VL);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      vf scale = splat(h[t * rank + i]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[t][v] = fma(scale, w[v], sum[t][v]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      Y* row = y + t * y_stride;
      int64_t at = n + v * VL;
      store_at(row, load_at(row, at, N) + sum[t][v], at, N);
    }
}

template <int TOKENS, class Y, class T>
static void expand_rows(Y* y, int64_t y_stride, const float* h, const T* b, const int32_t* rows,
                        int64_t rank, int64_t N) {
  int64_t n = 0;
  for (; n + 2 * VL <= N; n += 2 * VL) expand_tile<TOKENS, 2>(y, y_stride, h, b, rows, rank, N, n);
  for (; n < N; n += VL) expand_tile<TOKENS, 1>(y, y_stride, h, b, rows, rank, N, n);
}

template <class Y, class T>
static void project_up(Y* y, int64_t y_stride, int64_t tokens, const float* h, const T* b,
                       const int32_t* rows, int64_t rank, int64_t N) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) expand_rows<4>(y + t * y_stride, y_stride, h + t * rank, b, rows, rank, N);
  for (; t < tokens; t++) expand_rows<1>(y + t * y_stride, y_stride, h + t * rank, b, rows, rank, N);
}

struct Segments {
  const int32_t *token_start, *token_end, *row_offset, *rows, *ranks;
  int64_t rank_stride, count;

  int64_t rank(int64_t s) const { return ranks[s * rank_stride]; }
};

// `keys` is null without dropout; rows of a segment with rate 0 keep everything.
struct Dropout {
  const int64_t* keys;
  const double* rates;
  int64_t salt;

  double rate(int64_t segment) const { return keys ? rates[segment] : 0.0; }
};

template <class T>
static void drop_rows(const T* x, int64_t x_stride, int64_t tokens, int64_t K, const Dropout& dropout,
                      int64_t first_token, double rate, T* out) {
  for (int64_t t = 0; t < tokens; t++)
    drop_row(x + t * x_stride, K, RowMask(dropout.keys[first_token + t], dropout.salt, rate), out + t * K);
}

static void multiply(float* values, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i++) values[i] *= factor;
}

template <class T>
static void forward(T* y, int64_t y_stride, const T* x, int64_t x_stride, const T* a, const T* b,
                    const Segments& segments, const Dropout& dropout, int64_t N, int64_t K) {
  double work = 0;
  int64_t tiles = 0;
  for (int64_t s = 0; s < segments.count; s++) {
    int64_t tokens = segments.token_end[s] - segments.token_start[s];
    if (segments.rank(s) == 0 || tokens <= 0) continue;
    tiles += divide_up(tokens, FORWARD_TILE);
    work += (double)tokens * segments.rank(s) * (N + K);
  }
  struct Place {
    int32_t segment, token;
  };
  Place* places = (Place*)scratch(1, tiles * sizeof(Place) + 1);
  int64_t n = 0;
  for (int64_t s = 0; s < segments.count; s++)
    if (segments.rank(s))
      for (int32_t t = segments.token_start[s]; t < segments.token_end[s]; t += FORWARD_TILE)
        places[n++] = {(int32_t)s, t};
  parallel_for(tiles, work, [&](int64_t task) {
    Place p = places[task];
    int64_t rank = segments.rank(p.segment);
    int64_t tokens = smaller(FORWARD_TILE, segments.token_end[p.segment] - p.token);
    const int32_t* rows = segments.rows + segments.row_offset[p.segment];
    const T* input = x + p.token * x_stride;
    double rate = dropout.rate(p.segment);
    size_t dropped_bytes = rate > 0 ? tokens * K * sizeof(T) : 0;
    float* h = (float*)scratch(0, tokens * rank * sizeof(float) + dropped_bytes);
    if (rate > 0) {
      T* kept = (T*)(h + tokens * rank);
      drop_rows(input, x_stride, tokens, K, dropout, p.token, rate, kept);
      project_down((const T*)kept, K, tokens, a, rows, rank, K, h);
      multiply(h, tokens * rank, (float)(1.0 / (1.0 - rate)));
    } else {
      project_down(input, x_stride, tokens, a, rows, rank, K, h);
    }
    project_up(y + p.token * y_stride, y_stride, tokens, h, b, rows, rank, N);
  });
}

static void lora_forward(int64_t dtype, void* y, int64_t y_stride, const void* x, int64_t x_stride,
                         const void* a, const void* b, const int32_t* token_start, const int32_t* token_end,
                         const int32_t* row_offset, const int32_t* rows, const int32_t* ranks, int64_t rank_stride,
                         const int64_t* keys, const double* rates, int64_t salt, int64_t S, int64_t N, int64_t K) {
  Segments segments{token_start, token_end, row_offset, rows, ranks, rank_stride, S};
  Dropout dropout{keys, rates, salt};
  if (dtype == 0)
    forward((float*)y, y_stride, (const float*)x, x_stride, (const float*)a, (const float*)b, segments,
            dropout, N, K);
  else
    forward((bf16*)y, y_stride, (const bf16*)x, x_stride, (const bf16*)a, (const bf16*)b, segments, dropout, N,
            K);
}

// Columns of a task of the sums over tokens.
template <class T>
constexpr int64_t COLUMN_BLOCK = 96;
#if defined(__AVX512BF16__)
template <>
constexpr int64_t COLUMN_BLOCK<bf16> = 256;
#endif

// out[i, c] += sum over the tile's tokens of left[t, i] * right[t, c], tile after tile, last to first, for one
// block of columns.
template <class T>
static void token_sums(const float* left, int64_t rank, const T* right, int64_t right_stride, int64_t tokens,
                       int64_t token_offset, int64_t tile_tokens, int64_t column, int64_t end_column,
                       int64_t columns, float* out) {
  int64_t width = end_column - column, padded = round_up(width, 16);
  float* block = (float*)scratch(0, (tile_tokens + rank) * padded * sizeof(float));
  float* sums = block + tile_tokens * padded;
  int64_t first_tile = token_offset / tile_tokens;
  for (int64_t tile = (token_offset + tokens - 1) / tile_tokens; tile >= first_tile; tile--) {
    int64_t begin = larger(0, tile * tile_tokens - token_offset);
    int64_t end = smaller(tokens, (tile + 1) * tile_tokens - token_offset);
    for (int64_t t = begin; t < end; t++)
      for (int64_t c = 0; c < padded; c += VL)
        store(block + (t - begin) * padded + c,
              c < width ? load_at(right + t * right_stride + column, c, width) : vf{});
    matmul(rank, padded,
           {end - begin, left + begin * rank, 1, rank, block, padded, sums, padded, Into::SET});
    for (int64_t i = 0; i < rank; i++)
      for (int64_t c = 0; c < width; c += VL) {
        float* target = out + i * columns + column;
        store_at(target, load_at(target, c, width) + load(sums + i * padded + c), c, width);
      }
  }
}

// dx[t] += what the mask keeps of sum over i of dh[t, i] * a[rows[i]].
template <class T>
static void add_dropped(T* dx, int64_t dx_stride, int64_t tokens, const float* dh, const T* a,
                        const int32_t* rows, int64_t rank, int64_t K, const Dropout& dropout,
                        int64_t first_token, double rate) {
  constexpr int64_t GROUP = 4;
  float* sums = (float*)scratch(0, GROUP * K * sizeof(float));
  for (int64_t t = 0; t < tokens; t += GROUP) {
    int64_t count = smaller(GROUP, tokens - t);
    memset(sums, 0, count * K * sizeof(float));
    project_up(sums, K, count, dh + t * rank, a, rows, rank, K);
    for (int64_t i = 0; i < count; i++)
      add_kept(dx + (t + i) * dx_stride, sums + i * K, K,
               RowMask(dropout.keys[first_token + t + i], dropout.salt, rate));
  }
}

template <class T>
static void backward(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const T* a, const T* b,
                     const int32_t* rows, int64_t rank, T* dx, int64_t dx_stride, float* da, float* db,
                     int64_t token_offset, const Dropout& dropout, int64_t tokens, int64_t N, int64_t K) {
  if (tokens == 0 || rank == 0) return;
  double rate = dropout.rate(0);
  size_t dropped_bytes = rate > 0 ? tokens * K * sizeof(T) : 0;
  float* h = (float*)scratch(1, 2 * tokens * rank * sizeof(float) + dropped_bytes);
  float* dh = h + tokens * rank;
  T* kept = (T*)(dh + tokens * rank);
  double work = (double)tokens * rank * (N + K);
  parallel_for(divide_up(tokens, FORWARD_TILE), work * 1.5, [&](int64_t task) {
    int64_t t = task * FORWARD_TILE, count = smaller(FORWARD_TILE, tokens - t);
    if (rate > 0) {
      drop_rows(x + t * x_stride, x_stride, count, K, dropout, t, rate, kept + t * K);
      project_down((const T*)kept + t * K, K, count, a, rows, rank, K, h + t * rank);
      project_down(dy + t * dy_stride, dy_stride, count, b, rows, rank, N, dh + t * rank);
      multiply(h + t * rank, count * rank, (float)(1.0 / (1.0 - rate)));
      multiply(dh + t * rank, count * rank, (float)(1.0 / (1.0 - rate)));
      add_dropped(dx + t * dx_stride, dx_stride, count, dh + t * rank, a, rows, rank, K, dropout, t, rate);
      return;
    }
    project_down(x + t * x_stride, x_stride, count, a, rows, rank, K, h + t * rank);
    project_down(dy + t * dy_stride, dy_stride, count, b, rows, rank, N, dh + t * rank);
    project_up(dx + t * dx_stride, dx_stride, count, dh + t * rank, a, rows, rank, K);
  });
  constexpr int64_t BLOCK = COLUMN_BLOCK<T>;
  int64_t a_blocks = da ? divide_up(K, BLOCK) : 0, b_blocks = divide_up(N, BLOCK);
  parallel_for(a_blocks + b_blocks, work, [&](int64_t task) {
    int64_t column = (task < a_blocks ? task : task - a_blocks) * BLOCK;
    if (task < a_blocks)
      token_sums(dh, rank, rate > 0 ? (const T*)kept : x, rate > 0 ? K : x_stride, tokens, token_offset, TOKEN_TILE,
                 column, smaller(column + BLOCK, K), K, da);
    else
      token_sums(h, rank, dy, dy_stride, tokens, token_offset, TOKEN_TILE, column, smaller(column + BLOCK, N), N, db);
  });
}

static void lora_backward(int64_t dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                          const void* a, const void* b, const int32_t* rows, int64_t rank, void* dx,
                          int64_t dx_stride, float* da, float* db, int64_t token_offset, const int64_t* keys,
                          const double* rates, int64_t salt, int64_t T, int64_t N, int64_t K) {
  Dropout dropout{keys, rates, salt};
  if (dtype == 0)
    backward((const float*)dy, dy_stride, (const float*)x, x_stride, (const float*)a, (const float*)b, rows,
             rank, (float*)dx, dx_stride, da, db, token_offset, dropout, T, N, K);
  else
    backward((const bf16*)dy, dy_stride, (const bf16*)x, x_stride, (const bf16*)a, (const bf16*)b, rows, rank,
             (bf16*)dx, dx_stride, da, db, token_offset, dropout, T, N, K);
}

void add_lora(Kernels& table) {
  table.lora_forward = lora_forward;
  table.lora_backward = lora_backward;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
