// Products of few rows, as in decoding: keys are transposed and values interleaved in registers on the way, and all
// rows (a group's query heads) share them. Every sum is the same chain as in the products of many rows.
#pragma once
#include "attention.h"
#include "tile_bf16.h"

namespace coserve {
namespace COSERVE_ISA {

constexpr int64_t FEW_ROWS = 8;

template <class T>
struct Pointers {
  const T *keys[KEY_BLOCK], *values[KEY_BLOCK];
};

// Rows that come next. They lie in blocks of a few keys anywhere, where no hardware looks ahead, so they are asked for
// bit by bit between products (a burst would wait for itself), into the second cache: the first takes few misses at
// a time.
template <class T>
struct Next {
  Pointers<T> at;
  int64_t count = 0;

  void fetch_keys(int64_t from, int64_t to, int64_t D) const { fetch(at.keys, from, smaller(to, count), D); }
  void fetch_values(int64_t from, int64_t to, int64_t D) const { fetch(at.values, from, smaller(to, count), D); }

 private:
  static void fetch(const T* const* rows, int64_t from, int64_t to, int64_t D) {
    for (int64_t j = from; j < to; j++)
      for (int64_t byte = 0; byte < D * (int64_t)sizeof(T); byte += 64)
        __builtin_prefetch((const char*)rows[j] + byte, 0, 2);
  }
};

// Calls run.template of<ROWS>().
template <class Run>
static inline void with_rows(int64_t rows, const Run& run) {
  switch (rows) {
    case 1: return run.template of<1>();
    case 2: return run.template of<2>();
    case 3: return run.template of<3>();
    case 4: return run.template of<4>();
    case 5: return run.template of<5>();
    case 6: return run.template of<6>();
    case 7: return run.template of<7>();
    default: return run.template of<8>();
  }
}

template <class T>
struct FewScores {
  const float* q;  // [rows, Dp], zero beyond D
  int64_t D, Dp;
  const T* const* keys;
  int64_t count;
  float* scores;  // [rows, KEY_BLOCK]
  const Next<T>& next;

  template <int ROWS>
  void of() const {
    next.fetch_keys(round_up(count, VL), KEY_BLOCK, D);
    for (int64_t j = 0; j < count; j += VL) {
      next.fetch_keys(j, j + VL, D);
      vf sum[ROWS] = {};
      for (int64_t d = 0; d < D; d += VL) {
        vf block[VL];
        for (int i = 0; i < VL; i++) block[i] = j + i < count ? load_at(keys[j + i], d, D) : vf{};
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++)
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; r++) sum[r] = fma(splat(q[r * Dp + d + i]), block[i], sum[r]);
      }
      for (int r = 0; r < ROWS; r++) store(scores + r * KEY_BLOCK + j, sum[r]);
    }
  }
};

template <class T>
static void few_scores(int64_t rows, const float* q, int64_t D, int64_t Dp, const T* const* keys, int64_t count,
                       float* scores, const Next<T>& next) {
  with_rows(rows, FewScores<T>{q, D, Dp, keys, count, scores, next});
}

template <class T>
struct FewOutputs {
  const float* weights;  // [rows, KEY_BLOCK]
  const T* const* values;
  int64_t count, D, Dp;
  float* o;  // [rows, Dp], added to
  const Next<T>& next;

  template <int ROWS>
  void of() const {
    constexpr int64_t WIDTH = 2 * VL;  // divides D_STEP or is twice it
    next.fetch_values(count, KEY_BLOCK, D);
    for (int64_t d = 0; d < Dp; d += WIDTH) {
      bool both = d + VL < Dp;
      vf sum[ROWS][2];
      for (int r = 0; r < ROWS; r++) {
        sum[r][0] = load(o + r * Dp + d);
        sum[r][1] = both ? load(o + r * Dp + d + VL) : vf{};
      }
      for (int64_t j = 0; j < count; j++) {
        if (d == 0) next.fetch_values(j, j + 1, D);
        vf low = load_at(values[j], d, D), high = both && d + VL < D ? load_at(values[j], d + VL, D) : vf{};
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          vf weight = splat(weights[r * KEY_BLOCK + j]);
          sum[r][0] = fma(weight, low, sum[r][0]);
          sum[r][1] = fma(weight, high, sum[r][1]);
        }
      }
      for (int r = 0; r < ROWS; r++) {
        store(o + r * Dp + d, sum[r][0]);
        if (both) store(o + r * Dp + d + VL, sum[r][1]);
      }
    }
  }
};

template <class T>
static void few_outputs(int64_t rows, const float* weights, const T* const* values, int64_t count, int64_t D,
                        int64_t Dp, float* o, const Next<T>& next) {
  with_rows(rows, FewOutputs<T>{weights, values, count, D, Dp, o, next});
}

#if defined(__AVX512BF16__)

struct FewPairScores {
  const bf16* q;  // [rows, D]
  int64_t D;
  const bf16* const* keys;
  int64_t count;
  float* scores;
  const Next<bf16>& next;

  // PAIRS pairs of dimensions from d on of 16 keys.
  template <int ROWS, int PAIRS>
  inline void add(int64_t j, int64_t d, vf (&sum)[ROWS]) const {
    vf block[VL];
    for (int i = 0; i < VL; i++) block[i] = j + i < count ? (vf)load_half_row(keys[j + i], d, D) : vf{};
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < PAIRS; i++)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++)
        sum[r] = (vf)_mm512_dpbf16_ps((__m512)sum[r], pair_at(q + r * D + d + 2 * i), (__m512bh)block[i]);
  }

  template <int ROWS>
  void of() const {
    next.fetch_keys(round_up(count, VL), KEY_BLOCK, D);
    for (int64_t j = 0; j < count; j += VL) {
      next.fetch_keys(j, j + VL, D);
      vf sum[ROWS] = {};
      int64_t d = 0;
      for (; d + 2 * VL <= D; d += 2 * VL) add<ROWS, VL>(j, d, sum);
      if (d < D) add<ROWS, VL / 2>(j, d, sum);
      for (int r = 0; r < ROWS; r++) store(scores + r * KEY_BLOCK + j, sum[r]);
    }
  }
};

static void few_pair_scores(int64_t rows, const bf16* q, int64_t D, const bf16* const* keys, int64_t count,
                            float* scores, const Next<bf16>& next) {
  with_rows(rows, FewPairScores{q, D, keys, count, scores, next});
}

struct FewPairOutputs {
  const bf16* weights;  // [rows, KEY_BLOCK]
  const bf16* const* values;
  int64_t count, D;
  float* o;
  int64_t Dp;
  const Next<bf16>& next;

  template <int ROWS>
  void of() const {
    next.fetch_values(round_up(count, 2), KEY_BLOCK, D);
    for (int64_t d = 0; d < D; d += 2 * VL) {
      vf sum[ROWS][2] = {};
      for (int64_t j = 0; j < count; j += 2) {
        if (d == 0) next.fetch_values(j, j + 2, D);
        __m512i odd = j + 1 < count ? load_half_row(values[j + 1], d, D) : _mm512_setzero_si512(), first, others;
        interleave(load_half_row(values[j], d, D), odd, &first, &others);
        __m512bh low = as_pairs(first), high = as_pairs(others);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          __m512bh weight = pair_at(weights + r * KEY_BLOCK + j);
          sum[r][0] = (vf)_mm512_dpbf16_ps((__m512)sum[r][0], weight, low);
          sum[r][1] = (vf)_mm512_dpbf16_ps((__m512)sum[r][1], weight, high);
        }
      }
      for (int r = 0; r < ROWS; r++) {
        float* at = o + r * Dp + d;
        store(at, load(at) + sum[r][0]);
        if (d + VL < D) store(at + VL, load(at + VL) + sum[r][1]);
      }
    }
  }
};

static void few_pair_outputs(int64_t rows, const bf16* weights, const bf16* const* values, int64_t count, int64_t D,
                             float* o, int64_t Dp, const Next<bf16>& next) {
  with_rows(rows, FewPairOutputs{weights, values, count, D, o, Dp, next});
}

#endif

}  // namespace COSERVE_ISA
}  // namespace coserve
