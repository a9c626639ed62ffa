// Forward attention, paged and over training windows: which tiles there are and who computes them.
#include "attention_tile.h"

extern "C" float logf(float);

namespace coserve {
namespace COSERVE_ISA {

// The heads of one group for tokens [begin, end): loads q, writes o (and lse, if asked).
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
    if (t.pairs)
      for (int64_t r = 0; r < t.rows; r++) memcpy(t.q_pairs + r * D, at(r), D * sizeof(bf16));
    else
      load_rows(at, t.rows, t.rows, D, 1.0f, t.q);
  }
  void write(const Sums& sums, int64_t Dp, int64_t begin, int64_t end, int64_t kv_head) const {
    for (int64_t r = 0; r < (end - begin) * group; r++) {
      int64_t head = (begin + r / group) * N + kv_head * group + r % group;
      float total = total_of(sums, r), inverse = 1.0f / total;
      for (int64_t d = 0; d < D; d += VL) store_at(o + head * D, load(sums.o + r * Dp + d) * inverse, d, D);
      if (lse) lse[head] = sums.top[r] * LN_2 + logf(total);
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

  int64_t position(int64_t sequence, int64_t token) const {
    return context_lens[sequence] - (query_start[sequence + 1] - token);
  }
  int64_t first_seen(int64_t position) const { return window ? larger(0, position + 1 - window) : 0; }
};

// Tokens [token, end) of a sequence. A split tile's chunks are tasks of their own whose sums stand from `sums` on.
struct Place {
  int64_t sequence, token, end, first_chunk, chunks, sums;
  bool split;
};

template <class T>
struct PagedRun {
  const Heads<T>& heads;
  const Paged& cache;
  int64_t Nkv;
  float* parts;

  int64_t Dp() const { return round_up(heads.D, D_STEP); }
  int64_t part_floats(const Place& p) const { return sums_floats((p.end - p.token) * heads.group, Dp()); }
  Sums part(const Place& p, int64_t kv_head, int64_t chunk) const {
    float* at = parts + p.sums + (kv_head * p.chunks + chunk) * part_floats(p);
    return sums_at(at, (p.end - p.token) * heads.group, Dp());
  }

  Tile load(const Place& place, int64_t kv_head) const {
    Tile t = make_tile(heads.D, heads.scale, heads.cap, on_pairs<T>(heads.D));
    heads.load_queries(t, place.token, place.end, kv_head);
    int64_t position = cache.position(place.sequence, place.token);
    for (int64_t r = 0; r < t.rows; r++) {
      int64_t last = position + r / heads.group;
      t.sights[r] = {cache.first_seen(last), last, 0, 0};
    }
    return t;
  }

  // Fills in the rows of keys and values from `key` on, through the sequence's table.
  auto finder(const Place& place, int64_t kv_head) const {
    const int32_t* table = cache.tables + place.sequence * cache.table_stride;
    int64_t row = Nkv * heads.D, skip = kv_head * heads.D;
    return [this, table, row, skip](int64_t key, int64_t count, Pointers<T>& at) {
      int64_t index = key / cache.block_size, offset = key % cache.block_size;
      for (int64_t j = 0; j < count; index++, offset = 0) {
        const T* k = (const T*)cache.k + table[index] * cache.k_block_stride + skip;
        const T* v = (const T*)cache.v + table[index] * cache.v_block_stride + skip;
        for (; offset < cache.block_size && j < count; offset++, j++)
          at.keys[j] = k + offset * row, at.values[j] = v + offset * row;
      }
    };
  }

  // The first keys of a later task of few rows; none of another, which reads each key for many.
  void first_keys(const Place& place, int64_t kv_head, int64_t chunk, Next<T>& next) const {
    next.count = 0;
    if ((place.end - place.token) * heads.group > FEW_ROWS) return;
    int64_t position = cache.position(place.sequence, place.token);
    int64_t seen = cache.first_seen(position) / KEY_BLOCK * KEY_BLOCK;
    int64_t key = larger(seen, (place.first_chunk + chunk) * CHUNK_KEYS);
    next.count = smaller(KEY_BLOCK, position + place.end - place.token - key);
    finder(place, kv_head)(key, next.count, next.at);
  }

  template <class Follow>
  void tile(const Place& place, int64_t kv_head, const Follow& follow) const {
    Tile t = load(place, kv_head);
    attend<T>(t, finder(place, kv_head), follow);
    heads.write(t.sums, t.Dp, place.token, place.end, kv_head);
  }
  template <class Follow>
  void chunk(const Place& place, int64_t kv_head, int64_t index, const Follow& follow) const {
    Tile t = load(place, kv_head);
    t.chunk = part(place, kv_head, index);
    Reach keys = reach(t);
    int64_t chunk = place.first_chunk + index, limit = smaller(keys.last + 1, (chunk + 1) * CHUNK_KEYS);
    attend_chunk<T>(t, chunk, keys.first, keys.last, limit, finder(place, kv_head), follow);
  }
  void join(const Place& place, int64_t kv_head) const {
    int64_t rows = (place.end - place.token) * heads.group;
    Sums sums = sums_at((float*)scratch(0, sums_floats(rows, Dp()) * sizeof(float)), rows, Dp());
    clear(sums, rows, Dp());
    for (int64_t c = 0; c < place.chunks; c++)
      for (int64_t r = 0; r < rows; r++) merge_row(sums, part(place, kv_head, c), r, Dp());
    heads.write(sums, Dp(), place.token, place.end, kv_head);
  }
};

// Cuts the queries into tiles; returns their number and the work. A tile is split where it has more than its share.
template <class T>
static int64_t plan(const PagedRun<T>& run, int64_t S, int64_t threads, Place* places, double* work,
                    int64_t* split_floats) {
  const Paged& cache = run.cache;
  int64_t step = tile_tokens(run.heads.group), n = 0, floats = 0;
  double total = 0;
  auto tile_work = [&](const Place& p) { return (double)(p.end - p.token) * p.chunks; };
  for (int64_t s = 0; s < S; s++)
    for (int64_t token = cache.query_start[s]; token < cache.query_start[s + 1]; token += step) {
      int64_t end = smaller(cache.query_start[s + 1], token + step);
      int64_t position = cache.position(s, token);
      int64_t first = cache.first_seen(position), last = position + end - token - 1;
      int64_t first_chunk = first / CHUNK_KEYS, chunks = last / CHUNK_KEYS - first_chunk + 1;
      places[n] = {s, token, end, first_chunk, chunks, 0, false};
      total += tile_work(places[n++]);
    }
  for (int64_t i = 0; i < n && threads > 1; i++) {
    Place& p = places[i];
    if (p.chunks < 2 || tile_work(p) * 2 * threads <= total * run.Nkv) continue;
    p.split = true;
    p.sums = floats;
    floats += run.Nkv * p.chunks * run.part_floats(p);
  }
  *work = 2.0 * total * CHUNK_KEYS * run.heads.N * run.heads.D;
  *split_floats = floats;
  return n;
}

template <class T>
static void paged(const Heads<T>& heads, const Paged& cache, int64_t S, int64_t Nkv) {
  PagedRun<T> run{heads, cache, Nkv, nullptr};
  const int64_t step = tile_tokens(heads.group), threads = omp_get_max_threads();
  int64_t most = 0, floats, tasks = 0;
  for (int64_t s = 0; s < S; s++) most += divide_up(cache.query_start[s + 1] - cache.query_start[s], step);
  Place* places = (Place*)scratch(1, most * (sizeof(Place) + sizeof(int64_t)) + 1);
  double work;
  int64_t tiles = plan(run, S, threads, places, &work, &floats), *first_task = (int64_t*)(places + most);
  run.parts = (float*)scratch(2, floats * sizeof(float) + 1);
  for (int64_t i = 0; i < tiles; i++) {
    first_task[i] = tasks;
    tasks += Nkv * (places[i].split ? places[i].chunks : 1);
  }
  auto tile_of = [&](int64_t task) {  // the last whose tasks begin at or before this one
    int64_t low = 0, high = tiles;
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      (first_task[middle] <= task ? low : high) = middle;
    }
    return low;
  };
  parallel_for(tasks, work, [&](int64_t task) {
    int64_t index = tile_of(task), own = task - first_task[index];
    const Place& place = places[index];
    auto follow = [&](Next<T>& next) {
      int64_t later = task + threads;  // the others take the tasks in between
      next.count = 0;
      if (later >= tasks) return;
      int64_t then = tile_of(later), part = later - first_task[then];
      run.first_keys(places[then], part % Nkv, part / Nkv, next);
    };
    if (place.split)
      run.chunk(place, own % Nkv, own / Nkv, follow);
    else
      run.tile(place, own, follow);
  });
  if (floats)
    parallel_for(tiles * Nkv, 0.0, [&](int64_t i) {
      if (places[i / Nkv].split) run.join(places[i / Nkv], i % Nkv);
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
  const int32_t *first_key, *gaps;
  int64_t window_start;
};

template <class T>
static void window(const Heads<T>& heads, const Stream& stream, int64_t W, int64_t Nkv) {
  int64_t step = tile_tokens(heads.group), tiles = divide_up(W, step), D = heads.D;
  double work = 2.0 * W * (stream.window_start + W) * heads.N * D;
  parallel_for(tiles * Nkv, work, [&](int64_t task) {
    int64_t kv_head = task % Nkv, begin = (tiles - 1 - task / Nkv) * step;  // the longest first
    int64_t end = smaller(W, begin + step);
    Tile t = make_tile(D, heads.scale, heads.cap, on_pairs<T>(D));
    heads.load_queries(t, begin, end, kv_head);
    for (int64_t r = 0; r < t.rows; r++)
      t.sights[r] = sight_of(stream.first_key, stream.gaps, stream.window_start, begin + r / heads.group);
    attend<T>(t, [&](int64_t key, int64_t count, Pointers<T>& at) {
      for (int64_t j = 0; j < count; j++) {
        at.keys[j] = (const T*)stream.k + (key + j) * stream.k_stride + kv_head * D;
        at.values[j] = (const T*)stream.v + (key + j) * stream.v_stride + kv_head * D;
      }
    }, [](Next<T>& next) { next.count = 0; });
    heads.write(t.sums, t.Dp, begin, end, kv_head);
  });
}

static void window_attention(int64_t dtype, const void* q, int64_t q_stride, const void* k, int64_t k_stride,
                             const void* v, int64_t v_stride, const int32_t* first_key,
                             const int32_t* gaps, int64_t window_start, int64_t W, int64_t N, int64_t Nkv, int64_t D,
                             double scale, double cap, void* o, float* lse) {
  Stream stream{k, v, k_stride, v_stride, first_key, gaps, window_start};
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
