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
constexpr int64_t BANDWIDTH_TOKENS = 12;  // fewer wait for the rows' bytes, not for arithmetic

#if defined(__AVX512F__)
constexpr int DOT_TOKENS = 4, DOT_RANKS = 4;
#else
constexpr int DOT_TOKENS = 2, DOT_RANKS = 4;
#endif

// h[t, i] = x[t] . a[i] for TOKENS x RANKS of them.
template <int TOKENS, int RANKS, class T>
static void dots(const T* x, int64_t x_stride, const T* const* a, int64_t K, float* h, int64_t h_stride) {
  vf sum[TOKENS][RANKS] = {};
  int64_t k = 0;
  for (; k + VL <= K; k += VL) {
    vf w[RANKS];
#pragma GCC unroll 8
    for (int i = 0; i < RANKS; i++) w[i] = load(a[i] + k);
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
        sum[t][i] = fma(load_n(x + t * x_stride + k, K - k), load_n(a[i] + k, K - k), sum[t][i]);
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 8
    for (int i = 0; i < RANKS; i++) h[t * h_stride + i] = reduce_add(sum[t][i]);
}

template <class T>
static void project_down(const T* x, int64_t x_stride, int64_t tokens, const T* const* a, int64_t rank, int64_t K,
                         float* h, int64_t h_stride) {
  for (int64_t t = 0; t < tokens;) {
    bool wide = tokens - t >= DOT_TOKENS;
    for (int64_t i = 0; i < rank;) {
      const T* from = x + t * x_stride;
      float* to = h + t * h_stride + i;
      bool full = rank - i >= DOT_RANKS;
      if (wide && full) dots<DOT_TOKENS, DOT_RANKS>(from, x_stride, a + i, K, to, h_stride);
      if (wide && !full) dots<DOT_TOKENS, 1>(from, x_stride, a + i, K, to, h_stride);
      if (!wide && full) dots<1, DOT_RANKS>(from, x_stride, a + i, K, to, h_stride);
      if (!wide && !full) dots<1, 1>(from, x_stride, a + i, K, to, h_stride);
      i += full ? DOT_RANKS : 1;
    }
    t += wide ? DOT_TOKENS : 1;
  }
}

// y[t] += sum over i of h[t, i] * b[i] for TOKENS tokens and `vectors` vectors of columns.
template <int TOKENS, int VECTORS, class Y, class T>
static void expand_tile(Y* y, int64_t y_stride, const float* h, int64_t h_stride, const T* const* b, int64_t rank,
                        int64_t n, int64_t end) {
  vf sum[TOKENS][VECTORS] = {};
  for (int64_t i = 0; i < rank; i++) {
    vf w[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) w[v] = VECTORS == 1 ? load_at(b[i], n, end) : load(b[i] + n + v * VL);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      vf scale = splat(h[t * h_stride + i]);
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
      store_at(row, load_at(row, at, end) + sum[t][v], at, end);
    }
}

template <int TOKENS, class Y, class T>
static void expand_rows(Y* y, int64_t y_stride, const float* h, int64_t h_stride, const T* const* b, int64_t rank,
                        int64_t n, int64_t end) {
  for (; n + 2 * VL <= end; n += 2 * VL) expand_tile<TOKENS, 2>(y, y_stride, h, h_stride, b, rank, n, end);
  for (; n < end; n += VL) expand_tile<TOKENS, 1>(y, y_stride, h, h_stride, b, rank, n, end);
}

// y[t, c] += sum over i of h[t, i] * b[i][c] for the columns [column, end).
template <class Y, class T>
static void project_up(Y* y, int64_t y_stride, int64_t tokens, const float* h, int64_t h_stride, const T* const* b,
                       int64_t rank, int64_t column, int64_t end) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4)
    expand_rows<4>(y + t * y_stride, y_stride, h + t * h_stride, h_stride, b, rank, column, end);
  for (; t < tokens; t++)
    expand_rows<1>(y + t * y_stride, y_stride, h + t * h_stride, h_stride, b, rank, column, end);
}

// For each of `parts` out[i, c] += sum over the tokens of left[t, first + i] * right[t, c], for the columns
// [column, end_column) and one tile of tokens.
template <class T>
static void token_sums(const float* left, int64_t left_stride, int64_t, const Sums* parts, int64_t count,
                       const T* right, int64_t right_stride, int64_t tokens, int64_t column, int64_t end_column) {
  int64_t width = end_column - column, padded = round_up(width, 16), most = 0;
  for (int64_t p = 0; p < count; p++) most = larger(most, parts[p].rank);
  float* block = (float*)scratch(0, (tokens + most) * padded * sizeof(float));
  float* sums = block + tokens * padded;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t c = 0; c < padded; c += VL)
      store(block + t * padded + c, c < width ? load_at(right + t * right_stride + column, c, width) : vf{});
  for (const Sums* p = parts; p < parts + count; p++) {
    matmul(p->rank, padded, {tokens, left + p->first, 1, left_stride, block, padded, sums, padded, Into::SET});
    for (int64_t i = 0; i < p->rank; i++)
      for (int64_t c = 0; c < width; c += VL) {
        float* target = p->out + i * p->stride + column;
        store_at(target, load_at(target, c, width) + load(sums + i * padded + c), c, width);
      }
  }
}

struct Segments {
  const int32_t *token_start, *token_end, *row_offset, *rows, *ranks;
  int64_t count;

  int64_t rank(int64_t line, int64_t s) const { return ranks[line * count + s]; }
};

// `keys` is null without dropout; rows of a segment with rate 0 keep everything.
struct Dropout {
  const int64_t* keys;
  const double* rates;

  double rate(int64_t segment) const { return keys ? rates[segment] : 0.0; }
};

template <class T>
static void drop_rows(const T* x, int64_t x_stride, int64_t tokens, int64_t K, const int64_t* keys, int64_t salt,
                      double rate, T* out) {
  for (int64_t t = 0; t < tokens; t++) drop_row(x + t * x_stride, K, RowMask(keys[t], salt, rate), out + t * K);
}

static void multiply(float* values, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i++) values[i] *= factor;
}

// Columns of a task of the sums over tokens.
template <class T>
constexpr int64_t COLUMN_BLOCK = 96;
#if defined(__AVX512BF16__)
template <>
constexpr int64_t COLUMN_BLOCK<bf16> = 512;
#endif

// One module of a merged product: its rows in the pool, its columns of y, its line in the table of ranks, the salt
// of its masks.
template <class T>
struct ForwardModule {
  const T *a, *b;
  int64_t column, columns, line, salt;
};

struct Tile {  // some of a segment's tokens
  int64_t segment, token, tokens;
};

struct Task {  // of a tile: ranks of a module from `first` on, or columns; its h lies at `h`
  int64_t tile, module, first, h;
};

constexpr int64_t RANK_BLOCK = 16, EXPAND_COLUMNS = 1024;

// Pointers to the rows numbered `rows` of a pool's tensor.
template <class T>
static const T** row_pointers(const T* pool, const int32_t* rows, int64_t rank, int64_t width, void* memory) {
  const T** pointers = (const T**)memory;
  for (int64_t i = 0; i < rank; i++) pointers[i] = pool + rows[i] * width;
  return pointers;
}

template <class T>
struct Forward {
  T* y;
  int64_t y_stride;
  const T* x;
  int64_t x_stride, K;
  const ForwardModule<T>* modules;
  int64_t M;
  Segments segments;
  Dropout dropout;
  Tile* tiles = nullptr;
  Task *downs = nullptr, *ups = nullptr;
  float* h = nullptr;
  int64_t num_tiles = 0, num_downs = 0, num_ups = 0, h_size = 0;
  double work = 0;

  // Counts tiles and tasks, or writes them where there is memory for them.
  void plan() {
    num_tiles = num_downs = num_ups = h_size = 0;
    work = 0;
    for (int64_t s = 0; s < segments.count; s++)
      for (int64_t t = segments.token_start[s]; t < segments.token_end[s]; t += FORWARD_TILE) {
        int64_t tokens = smaller(FORWARD_TILE, segments.token_end[s] - t);
        if (tiles) tiles[num_tiles] = {s, t, tokens};
        for (int64_t m = 0; m < M; m++) {
          int64_t rank = segments.rank(modules[m].line, s), step = dropout.rate(s) > 0 ? rank : RANK_BLOCK;
          if (!rank) continue;
          for (int64_t i = 0; i < rank; i += step, num_downs++)
            if (tiles) downs[num_downs] = {num_tiles, m, i, h_size};
          for (int64_t n = 0; n < modules[m].columns; n += EXPAND_COLUMNS, num_ups++)
            if (tiles) ups[num_ups] = {num_tiles, m, n, h_size};
          h_size += tokens * rank;
          work += (double)larger(tokens, BANDWIDTH_TOKENS) * rank * (K + modules[m].columns);
        }
        num_tiles++;
      }
  }

  void down(const Task& task) const {
    const Tile& tile = tiles[task.tile];
    const ForwardModule<T>& module = modules[task.module];
    const int64_t rank = segments.rank(module.line, tile.segment);
    const int32_t* rows = segments.rows + segments.row_offset[tile.segment] + task.first;
    const T* input = x + tile.token * x_stride;
    float* out = h + task.h + task.first;
    double rate = dropout.rate(tile.segment);
    int64_t count = rate > 0 ? rank : smaller(RANK_BLOCK, rank - task.first);
    size_t dropped_bytes = rate > 0 ? tile.tokens * K * sizeof(T) : 0;
    const T** a = row_pointers(module.a, rows, count, K, scratch(0, count * sizeof(T*) + dropped_bytes));
    if (rate > 0) {
      T* kept = (T*)(a + count);
      drop_rows(input, x_stride, tile.tokens, K, dropout.keys + tile.token, module.salt, rate, kept);
      project_down((const T*)kept, K, tile.tokens, a, count, K, out, rank);
      multiply(out, tile.tokens * rank, (float)(1.0 / (1.0 - rate)));
    } else {
      project_down(input, x_stride, tile.tokens, a, count, K, out, rank);
    }
  }

  void up(const Task& task) const {
    const Tile& tile = tiles[task.tile];
    const ForwardModule<T>& module = modules[task.module];
    const int64_t rank = segments.rank(module.line, tile.segment), N = module.columns;
    const int32_t* rows = segments.rows + segments.row_offset[tile.segment];
    const T** b = row_pointers(module.b, rows, rank, N, scratch(0, rank * sizeof(T*)));
    project_up(y + tile.token * y_stride + module.column, y_stride, tile.tokens, h + task.h, rank, b, rank, task.first,
               smaller(N, task.first + EXPAND_COLUMNS));
  }

  void run() {
    plan();
    char* memory = (char*)scratch(1, num_tiles * sizeof(Tile) + (num_downs + num_ups) * sizeof(Task) +
                                         h_size * sizeof(float) + 64);
    tiles = (Tile*)memory;
    downs = (Task*)(tiles + num_tiles);
    ups = downs + num_downs;
    h = (float*)(ups + num_ups);
    plan();
    parallel_for(num_downs, work / 2, [&](int64_t i) { down(downs[i]); });
    parallel_for(num_ups, work / 2, [&](int64_t i) { up(ups[i]); });
  }
};

template <class T>
static void forward(void* y, int64_t y_stride, const void* x, int64_t x_stride, const int64_t* table, int64_t M,
                    const Segments& segments, const Dropout& dropout, int64_t K) {
  Forward<T> op{(T*)y, y_stride, (const T*)x, x_stride, K, (const ForwardModule<T>*)table, M, segments, dropout};
  op.run();
}

static void lora_forward(int64_t dtype, void* y, int64_t y_stride, const void* x, int64_t x_stride,
                         const int64_t* modules, int64_t M, const int32_t* token_start, const int32_t* token_end,
                         const int32_t* row_offset, const int32_t* rows, const int32_t* ranks, const int64_t* keys,
                         const double* rates, int64_t S, int64_t K) {
  Segments segments{token_start, token_end, row_offset, rows, ranks, S};
  auto run = dtype == 0 ? forward<float> : forward<bf16>;
  run(y, y_stride, x, x_stride, modules, M, segments, {keys, rates}, K);
}

// dx[t] += what the mask keeps of sum over i of dh[t, i] * a[i].
template <class T>
static void add_dropped(T* dx, int64_t dx_stride, int64_t tokens, const float* dh, int64_t dh_stride,
                        const T* const* a, int64_t rank, int64_t K, const int64_t* keys, int64_t salt, double rate) {
  constexpr int64_t GROUP = 4;
  float* sums = (float*)scratch(0, GROUP * K * sizeof(float));
  for (int64_t t = 0; t < tokens; t += GROUP) {
    int64_t count = smaller(GROUP, tokens - t);
    memset(sums, 0, count * K * sizeof(float));
    project_up(sums, K, count, dh + t * dh_stride, dh_stride, a, rank, 0, K);
    for (int64_t i = 0; i < count; i++)
      add_kept(dx + (t + i) * dx_stride, sums + i * K, K, RowMask(keys[t + i], salt, rate));
  }
}

// One module of a merged product in training: its adapter's rows, its columns of dy, its sums (da null: A is frozen).
template <class T>
struct BackwardModule {
  const T *a, *b;
  int64_t column, columns, rank;
  const int32_t* rows;
  float *da, *db;
  int64_t salt;
};

// Modules that share x as it is: all of a product, or with dropout one.
template <class T>
struct Backward {
  const T* dy;
  int64_t dy_stride;
  const T* x;
  int64_t x_stride;
  T* dx;
  int64_t dx_stride, K;
  const BackwardModule<T>* modules;
  int64_t M, token_offset;
  const int64_t* keys;
  double rate;
  int64_t R = 0, num_a = 0;  // ranks of all modules; modules whose A is trained
  const T **a, **b;     // their rows
  Sums *da, *db;        // their sums, by module
  float *h, *dh;        // [tokens of a pass, R]
  T* kept = nullptr;    // x under the mask

  // h, dh and dx of tokens [t, t + count), the pass beginning at token `base`.
  void rows_of(int64_t base, int64_t t, int64_t count) const {
    const T* input = x + t * x_stride;
    int64_t input_stride = x_stride;
    float *h_out = h + (t - base) * R, *dh_out = dh + (t - base) * R;
    if (kept) {
      T* out = kept + (t - base) * K;
      drop_rows(input, x_stride, count, K, keys + t, modules->salt, rate, out);
      input = out;
      input_stride = K;
    }
    project_down(input, input_stride, count, a, R, K, h_out, R);
    for (int64_t m = 0, first = 0; m < M; first += modules[m++].rank)
      project_down(dy + t * dy_stride + modules[m].column, dy_stride, count, b + first, modules[m].rank,
                   modules[m].columns, dh_out + first, R);
    if (kept) {
      multiply(h_out, count * R, (float)(1.0 / (1.0 - rate)));
      multiply(dh_out, count * R, (float)(1.0 / (1.0 - rate)));
      add_dropped(dx + t * dx_stride, dx_stride, count, dh_out, R, a, R, K, keys + t, modules->salt, rate);
    } else {
      project_up(dx + t * dx_stride, dx_stride, count, dh_out, R, a, R, 0, K);
    }
  }

  // What the tokens [t, t + count), which lie in one tile, add to a block of columns of da or db.
  void sums_of(int64_t base, int64_t t, int64_t count, int64_t task, int64_t a_blocks) const {
    constexpr int64_t BLOCK = COLUMN_BLOCK<T>;
    const float *h_in = h + (t - base) * R, *dh_in = dh + (t - base) * R;
    if (task < a_blocks) {
      const T* input = kept ? kept + (t - base) * K : x + t * x_stride;
      int64_t column = task * BLOCK;
      token_sums(dh_in, R, R, da, num_a, input, kept ? K : x_stride, count, column, smaller(column + BLOCK, K));
      return;
    }
    task -= a_blocks;
    int64_t m = 0;
    for (; task >= divide_up(modules[m].columns, BLOCK); m++) task -= divide_up(modules[m].columns, BLOCK);
    int64_t column = task * BLOCK, N = modules[m].columns;
    const Sums own{0, db[m].rank, db[m].out, db[m].stride};
    token_sums(h_in + db[m].first, R, own.rank, &own, 1, dy + t * dy_stride + modules[m].column, dy_stride, count, column,
               smaller(column + BLOCK, N));
  }

  void run(int64_t tokens) {
    constexpr int64_t BLOCK = COLUMN_BLOCK<T>;
    int64_t columns = 0, a_blocks = 0, b_blocks = 0;
    for (int64_t m = 0; m < M; m++) {
      R += modules[m].rank;
      columns += modules[m].columns;
      b_blocks += divide_up(modules[m].columns, BLOCK);
      if (modules[m].da) a_blocks = divide_up(K, BLOCK);
    }
    // A pass takes a tile for every two threads: what it read of dy and x is still near when the sums are taken.
    int64_t pass = smaller(tokens + TOKEN_TILE, TOKEN_TILE * divide_up(omp_get_max_threads(), 2));
    int64_t kept_size = rate > 0 ? pass * K : 0;
    a = (const T**)scratch(1, 2 * R * sizeof(T*) + 2 * M * sizeof(Sums) + 2 * pass * R * sizeof(float) +
                                  kept_size * sizeof(T));
    b = a + R;
    da = (Sums*)(b + R);
    db = da + M;
    h = (float*)(db + M);
    dh = h + pass * R;
    if (rate > 0) kept = (T*)(dh + pass * R);
    for (int64_t m = 0, first = 0; m < M; first += modules[m++].rank) {
      const BackwardModule<T>& module = modules[m];
      row_pointers(module.a, module.rows, module.rank, K, a + first);
      row_pointers(module.b, module.rows, module.rank, module.columns, b + first);
      db[m] = {first, module.rank, module.db, module.columns};
      if (module.da) da[num_a++] = {first, module.rank, module.da, K};
    }
    const double work = (double)pass * R * (K + columns);
    const int64_t first_tile = token_offset / TOKEN_TILE, last_tile = (token_offset + tokens - 1) / TOKEN_TILE;
    auto start = [&](int64_t tile) { return larger(0, tile * TOKEN_TILE - token_offset); };
    auto end = [&](int64_t tile) { return smaller(tokens, (tile + 1) * TOKEN_TILE - token_offset); };
    for (int64_t last = last_tile; last >= first_tile; last -= pass / TOKEN_TILE) {
      const int64_t first = larger(first_tile, last + 1 - pass / TOKEN_TILE), base = start(first);
      parallel_for(divide_up(end(last) - base, FORWARD_TILE), work * 1.5, [&](int64_t task) {
        int64_t t = base + task * FORWARD_TILE;
        rows_of(base, t, smaller(FORWARD_TILE, end(last) - t));
      });
      parallel_for(a_blocks + b_blocks, work, [&](int64_t task) {
        for (int64_t tile = last; tile >= first; tile--)
          sums_of(base, start(tile), end(tile) - start(tile), task, a_blocks);
      });
    }
  }
};

template <class T>
static void backward(const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, const int64_t* table,
                     int64_t M, void* dx, int64_t dx_stride, int64_t token_offset, const int64_t* keys,
                     const double* rates, int64_t tokens, int64_t K) {
  const BackwardModule<T>* modules = (const BackwardModule<T>*)table;
  double rate = keys ? *rates : 0;
  int64_t together = rate > 0 ? 1 : M;  // modules have masks of their own
  for (int64_t m = 0; tokens && m < M; m += together) {
    Backward<T> op{(const T*)dy, dy_stride, (const T*)x, x_stride, (T*)dx, dx_stride, K, modules + m, together,
                   token_offset, keys, rate};
    op.run(tokens);
  }
}

static void lora_backward(int64_t dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                          const int64_t* modules, int64_t M, void* dx, int64_t dx_stride, int64_t token_offset,
                          const int64_t* keys, const double* rates, int64_t T, int64_t K) {
  auto run = dtype == 0 ? backward<float> : backward<bf16>;
  run(dy, dy_stride, x, x_stride, modules, M, dx, dx_stride, token_offset, keys, rates, T, K);
}

void add_lora(Kernels& table) {
  table.lora_forward = lora_forward;
  table.lora_backward = lora_backward;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
