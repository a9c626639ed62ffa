// From logits to tokens without sorting a vocabulary. One pass takes the maxima of strided groups of values; they say
// which chunks can hold the likeliest tokens, so that only those are looked at again, and a radix select over the few
// candidates finds where a filter cuts and which one is drawn. Of equal values the lowest id comes first.
#include "parallel.h"
#include "simd.h"

extern "C" double log(double);
extern "C" double nextafter(double, double);

namespace coserve {
namespace COSERVE_ISA {

constexpr int64_t CHUNK = 256;
constexpr float INFINITE = __builtin_inff(), LOWEST = -3.4028235e38f;
constexpr int FLOORS = 6;
constexpr float FLOOR[FLOORS] = {-4, -6, -8, -11, -14, -18};  // how far down top_p looks, step by step

// A row of V logits, and scratch for it.
template <class T>
struct Logits {
  const T* z;
  int64_t V, chunks;
  float* maxima;  // [chunks, VL]: lane l of a chunk is the largest of its elements l, l + VL, ...
  double* sums;   // [chunks]
  int32_t *ids, *chosen;
  float *values, *weights;
  float highest;

  vf at(int64_t i) const {  // -inf beyond the row's end
    if (i + VL <= V) return load(z + i);
    float lane[VL];
    for (int64_t l = 0; l < VL; l++) lane[l] = i + l < V ? load_n(z + i + l, 1)[0] : -INFINITE;
    return load(lane);
  }
};

template <class T>
static Logits<T> open_row(const T* z, int64_t V) {
  Logits<T> row{};
  row.z = z, row.V = V, row.chunks = divide_up(V, CHUNK);
  int64_t room = row.chunks * CHUNK + VL;
  row.sums = (double*)scratch(0, row.chunks * (sizeof(double) + VL * sizeof(float)) + 4 * room * sizeof(float));
  row.maxima = (float*)(row.sums + row.chunks);
  row.values = row.maxima + row.chunks * VL;
  row.weights = row.values + room;
  row.ids = (int32_t*)(row.weights + room);
  row.chosen = row.ids + room;
  vf highest = splat(-INFINITE);
  for (int64_t c = 0; c < row.chunks; c++) {
    vf top = splat(-INFINITE);
    for (int64_t i = c * CHUNK; i < smaller(V, (c + 1) * CHUNK); i += VL) top = vmax(row.at(i), top);
    store(row.maxima + c * VL, top);
    highest = vmax(top, highest);
  }
  row.highest = reduce_max(highest);
  return row;
}

template <class T>
static int64_t first_of_highest(const Logits<T>& row) {
  for (int64_t c = 0; c < row.chunks; c++) {
    if (reduce_max(load(row.maxima + c * VL)) != row.highest) continue;
    for (int64_t i = c * CHUNK; i < smaller(row.V, (c + 1) * CHUNK); i++)
      if (load_n(row.z + i, 1)[0] == row.highest) return i;
  }
  return 0;
}

static inline int64_t count_lanes(vi mask) {
  int64_t n = 0;
  for (int l = 0; l < VL; l++) n -= mask[l];
  return n;
}

// A value that at least `k` logits reach and few more do; -inf where the maxima are too few to tell.
template <class T>
static float reached_by(const Logits<T>& row, int64_t k) {
  auto enough = [&](float value) {
    vi count{};
    for (int64_t c = 0; c < row.chunks; c++) count += load(row.maxima + c * VL) >= value;
    return count_lanes(count) >= k;
  };
  float below = 0.125f, above = 0;
  while (!enough(row.highest - below)) {
    above = below;
    below *= 2;
    if (!(below < 1e30f)) return -INFINITE;
  }
  for (int step = 0; step < 8; step++) {
    float middle = 0.5f * (above + below);
    (enough(row.highest - middle) ? below : above) = middle;
  }
  return row.highest - below;
}

// ids and values of all elements whose value(logit), a function that never falls, is `floor` or more, in order of id.
template <class T, class Value>
static int64_t collect(const Logits<T>& row, float floor, const Value& value) {
  int64_t n = 0;
  floor = floor > LOWEST ? floor : LOWEST;  // a masked token is never a candidate
  for (int64_t c = 0; c < row.chunks; c++) {
    if (!(reduce_max(value(load(row.maxima + c * VL))) >= floor)) continue;
    for (int64_t i = c * CHUNK; i < smaller(row.V, (c + 1) * CHUNK); i += VL) {
      vf x = value(row.at(i));
#if defined(__AVX512F__)
      __mmask16 wanted = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(floor), _CMP_GE_OQ);
      if (!wanted) continue;
      __m512i lanes = _mm512_add_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                       _mm512_set1_epi32((int32_t)i));
      _mm512_storeu_ps(row.values + n, _mm512_maskz_compress_ps(wanted, (__m512)x));
      _mm512_storeu_si512(row.ids + n, _mm512_maskz_compress_epi32(wanted, lanes));
      n += __builtin_popcount(wanted);
#else
      for (int l = 0; l < VL; l++)
        if (x[l] >= floor) row.values[n] = x[l], row.ids[n++] = (int32_t)(i + l);
#endif
    }
  }
  return n;
}

// Ascending keys are descending values; values are 0 or less.
static inline uint32_t key_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffff;
}

// Of n candidates from the likeliest on, equal ones by id: the index of the first at which the weights' running sum is
// `goal` or more; the last one where none is. Without weights every candidate counts 1.
template <class T>
static int64_t descend(const Logits<T>& row, int64_t n, const float* weights, double goal) {
  auto weight = [&](int64_t i) { return weights ? (double)weights[i] : 1.0; };
  int32_t* chosen = row.chosen;
  for (int64_t i = 0; i < n; i++) chosen[i] = (int32_t)i;
  double before = 0;
  for (int shift = 23; shift >= -1; shift -= 8) {
    auto bucket = [&](int64_t i) { return (shift < 0 ? key_of(row.values[i]) << 1 : key_of(row.values[i]) >> shift) & 255; };
    double mass[256] = {};
    int64_t last = 0, kept = 0, wanted = 0;
    for (int64_t j = 0; j < n; j++) {
      int64_t b = bucket(chosen[j]);
      mass[b] += weight(chosen[j]);
      last = larger(last, b);
    }
    while (wanted < last && before + mass[wanted] < goal) before += mass[wanted++];
    for (int64_t j = 0; j < n; j++)
      if (bucket(chosen[j]) == wanted) chosen[kept++] = chosen[j];
    n = kept;
  }
  int64_t j = 0;
  for (; j + 1 < n && before + weight(chosen[j]) < goal; j++) before += weight(chosen[j]);
  return chosen[j];
}

// Keeps the candidates up to `cut` in that order; returns how many.
template <class T>
static int64_t keep_until(const Logits<T>& row, int64_t n, int64_t cut) {
  uint32_t least = key_of(row.values[cut]);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t key = key_of(row.values[i]);
    if (key > least || (key == least && i > cut)) continue;
    row.values[kept] = row.values[i], row.weights[kept] = row.weights[i], row.ids[kept++] = row.ids[i];
  }
  return kept;
}

// Where `number` in [0, 1) points in a CDF that ends at `total`: below its end, so that an entry above it exists.
static double target_of(double total, double number) {
  double target = number * total, end = nextafter(total, 0.0);
  return target < end ? target : end;
}

struct Filter {
  float temperature;
  int64_t top_k;
  double top_p, min_p, number;
};

// No filter: inverse CDF over the whole row in order of id, first by chunks and then inside one.
template <class T, class Value>
static int64_t draw_open(const Logits<T>& row, const Filter& f, const Value& value) {
  double total = 0;
  for (int64_t c = 0; c < row.chunks; c++) {
    vf sum{};
    for (int64_t i = c * CHUNK; i < smaller(row.V, (c + 1) * CHUNK); i += VL) sum += vexp(value(row.at(i)));
    row.sums[c] = reduce_add(sum);
    total += row.sums[c];
  }
  double rest = target_of(total, f.number), inside = 0, passed = 0;
  int64_t c = 0;
  for (; c + 1 < row.chunks && row.sums[c] <= rest; c++) rest -= row.sums[c];
  while (c > 0 && row.sums[c] == 0) rest = INFINITE, c--;  // rounding may leave the last chunk that has weight
  float weights[CHUNK];
  for (int64_t i = 0; i < CHUNK; i += VL) store(weights + i, vexp(value(row.at(c * CHUNK + i))));
  for (int64_t i = 0; i < CHUNK; i++) inside += weights[i];
  double end = target_of(inside, 1.0);
  rest = rest < end ? rest : end;
  for (int64_t i = 0; i < CHUNK; i++)
    if ((passed += weights[i]) > rest) return c * CHUNK + i;
  return first_of_highest(row);
}

// The candidates' weights, and their sum.
template <class T>
static double weigh(const Logits<T>& row, int64_t n) {
  for (int64_t i = 0; i < n; i += VL) store(row.weights + i, vexp(load(row.values + i)));
  double total = 0;
  for (int64_t i = 0; i < n; i++) total += row.weights[i];
  return total;
}

// top_p without other filters: candidates that have it, and the whole row's weight.
template <class T, class Value>
static int64_t collect_nucleus(const Logits<T>& row, double top_p, const Value& value, double* total) {
  vf above[FLOORS] = {};
  *total = 0;
  for (int64_t c = 0; c < row.chunks; c++) {
    vf sum{};
    for (int64_t i = c * CHUNK; i < smaller(row.V, (c + 1) * CHUNK); i += VL) {
      vf x = value(row.at(i)), p = vexp(x);
      sum += p;
#pragma GCC unroll 6
      for (int k = 0; k < FLOORS; k++) above[k] += x >= FLOOR[k] ? p : vf{};
    }
    *total += reduce_add(sum);
  }
  for (int k = 0; k <= FLOORS; k++) {
    if (k < FLOORS && reduce_add(above[k]) < top_p * *total) continue;
    int64_t n = collect(row, k < FLOORS ? FLOOR[k] : LOWEST, value);
    if (weigh(row, n) >= top_p * *total || k == FLOORS) return n;
  }
  return 0;
}

template <class T, class Value>
static int64_t draw_filtered(const Logits<T>& row, const Filter& f, const Value& value) {
  bool few = f.top_k > 0 && f.top_k < row.V;
  double total = 0;
  int64_t n;
  if (few || f.min_p > 0) {
    float floor = f.min_p > 0 ? (float)log(f.min_p) : LOWEST;
    if (few) {
      float reached = value(splat(reached_by(row, f.top_k)))[0];
      floor = reached > floor ? reached : floor;
    }
    n = collect(row, floor, value);
    if (few && n > f.top_k) n = keep_until(row, n, descend(row, n, nullptr, (double)f.top_k));
    total = weigh(row, n);
  } else {
    n = collect_nucleus(row, f.top_p, value, &total);
  }
  if (n == 0) return first_of_highest(row);
  if (f.top_p < 1.0) n = keep_until(row, n, descend(row, n, row.weights, f.top_p * total));
  double kept = 0;
  for (int64_t i = 0; i < n; i++) kept += row.weights[i];
  // the first above the target
  return row.ids[descend(row, n, row.weights, nextafter(target_of(kept, f.number), (double)INFINITE))];
}

template <class T>
static int64_t choose(const T* z, int64_t V, const Filter& f) {
  Logits<T> row = open_row(z, V);
  if (f.temperature == 0) return first_of_highest(row);
  const float highest = row.highest, heat = f.temperature > 1.2e-38f ? f.temperature : 1.2e-38f;
  auto value = [&](vf logit) { return (logit - highest) / heat; };
  if (f.top_k > 0 || f.top_p < 1.0 || f.min_p > 0) return draw_filtered(row, f, value);
  return draw_open(row, f, value);
}

static void sort_keys(uint64_t* keys, int64_t n) {  // Shell's method: there are few
  for (int64_t gap = n / 2; gap > 0; gap = gap == 2 ? 1 : gap * 5 / 11)
    for (int64_t i = gap; i < n; i++) {
      uint64_t key = keys[i];
      int64_t j = i;
      for (; j >= gap && keys[j - gap] > key; j -= gap) keys[j] = keys[j - gap];
      keys[j] = key;
    }
}

template <class T>
static void describe(const T* z, int64_t V, int64_t target, int64_t top, float* logprob, int64_t* rank,
                     int64_t* top_ids, float* top_logprobs) {
  Logits<T> row = open_row(z, V);
  double total = 0;
  for (int64_t c = 0; c < row.chunks; c++) {
    vf sum{};
    for (int64_t i = c * CHUNK; i < smaller(V, (c + 1) * CHUNK); i += VL) sum += vexp(row.at(i) - row.highest);
    total += reduce_add(sum);
  }
  const float highest = row.highest, rest = (float)log(total);
  auto value = [&](vf logit) { return logit - highest; };
  float own = value(splat(load_n(z + target, 1)[0]))[0];
  int64_t above = 0;
  for (int64_t c = 0; c < row.chunks; c++) {
    if (!(reduce_max(value(load(row.maxima + c * VL))) > own)) continue;
    vi count{};
    for (int64_t i = c * CHUNK; i < smaller(V, (c + 1) * CHUNK); i += VL) count += value(row.at(i)) > own;
    above += count_lanes(count);
  }
  *logprob = own - rest;
  *rank = above + 1;
  if (top == 0) return;
  int64_t n = collect(row, value(splat(reached_by(row, top)))[0], value);
  if (n > top) n = keep_until(row, n, descend(row, n, nullptr, (double)top));
  uint64_t* keys = (uint64_t*)row.weights;  // weights and ids behind it have room for n of them
  memcpy(row.chosen, row.ids, n * sizeof(int32_t));
  for (int64_t i = 0; i < n; i++) keys[i] = (uint64_t)key_of(row.values[i]) << 32 | (uint32_t)row.chosen[i];
  sort_keys(keys, n);
  for (int64_t i = 0; i < top; i++) {
    uint32_t bits = i < n ? (uint32_t)(keys[i] >> 32) : 0x7f800000u;
    float below;  // the likeliest logit
    memcpy(&below, &bits, sizeof below);
    top_logprobs[i] = -below - rest;
    top_ids[i] = i < n ? (int64_t)(uint32_t)keys[i] : -1;
  }
}

template <class F>
static void each_row(int64_t dtype, const void* logits, int64_t stride, const int64_t* rows, int64_t R, int64_t V, F work) {
  parallel_for(R, 4.0 * R * V, [&](int64_t i) {
    if (dtype == 0)
      work((const float*)logits + rows[i] * stride, i);
    else
      work((const bf16*)logits + rows[i] * stride, i);
  });
}

static void choose_tokens(int64_t dtype, const void* logits, int64_t stride, const int64_t* rows, int64_t R, int64_t V,
                          const double* temperature, const int64_t* top_k, const double* top_p, const double* min_p,
                          const double* number, int64_t* ids) {
  each_row(dtype, logits, stride, rows, R, V, [&](auto* z, int64_t i) {
    ids[i] = choose(z, V, {(float)temperature[i], top_k[i], top_p[i], min_p[i], number[i]});
  });
}

static void token_logprobs(int64_t dtype, const void* logits, int64_t stride, const int64_t* rows, int64_t R, int64_t V,
                           const int64_t* targets, int64_t top, float* logprobs, int64_t* ranks, int64_t* top_ids,
                           float* top_logprobs) {
  each_row(dtype, logits, stride, rows, R, V, [&](auto* z, int64_t i) {
    describe(z, V, targets[i], top, logprobs + i, ranks + i, top_ids + i * top, top_logprobs + i * top);
  });
}

// ids [n]: prompt, then output from `prompt` on. A token's bias comes before, its penalties once for each id.
static void penalize(float* logits, int64_t V, const int64_t* ids, int64_t n, int64_t prompt, double repetition,
                     double presence, double frequency) {
  constexpr int32_t DONE = -1;
  int32_t* count = (int32_t*)scratch(0, V * sizeof(int32_t));
  memset(count, 0, V * sizeof(int32_t));
  for (int64_t i = prompt; i < n; i++) count[ids[i]]++;
  const float again = (float)repetition, once = (float)presence, each = (float)frequency;
  for (int64_t i = 0; i < n; i++) {
    int64_t id = ids[i];
    if (count[id] == DONE) continue;
    float z = logits[id];
    if (again != 1.0f) z = z > 0 ? z / again : z * again;
    if (count[id] > 0) z -= each * count[id] + once;
    logits[id] = z;
    count[id] = DONE;
  }
}

void add_sampling(Kernels& table) {
  table.choose_tokens = choose_tokens;
  table.token_logprobs = token_logprobs;
  table.penalize = penalize;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
