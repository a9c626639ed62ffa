// Blocks of keys and values as fp32, shared by attention and its backward.
#pragma once
#include "parallel.h"
#include "tile.h"

namespace coserve {
namespace COSERVE_ISA {

constexpr int64_t KEY_BLOCK = 64;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
constexpr int64_t D_STEP = 16;  // head dims are padded to this in scratch
constexpr int64_t CHUNK_BLOCKS = 8, CHUNK_KEYS = CHUNK_BLOCKS * KEY_BLOCK;  // what threads share out: fixed, so that
                                                                            // no sum depends on their number

#if defined(__AVX512F__)
static const vi LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
static const vi LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#else
static const vi LANE = {0, 1, 2, 3};
#endif

template <int STEP>
__attribute__((always_inline)) static inline void exchange(vf* rows) {  // swaps the off-diagonal STEP x STEP blocks
  const vi low = (LANE & STEP) ? LANE - STEP + VL : LANE;
  const vi high = (LANE & STEP) ? LANE + VL : LANE + STEP;
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++)
    if (!(i & STEP)) {
      vf a = rows[i], b = rows[i + STEP];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + STEP] = __builtin_shuffle(a, b, high);
    }
}

__attribute__((always_inline)) static inline void transpose(vf* rows) {  // VL x VL, in registers
  exchange<1>(rows);
  exchange<2>(rows);
#if defined(__AVX2__)
  exchange<4>(rows);
#endif
#if defined(__AVX512F__)
  exchange<8>(rows);
#endif
}

// out[Dp, KEY_BLOCK] = the transpose of `count` rows at(0), at(1), ... of D elements, zero-filled to Dp and to
// `height` columns.
template <class At>
static void load_transposed(const At& at, int64_t count, int64_t height, int64_t D, float* out) {
  for (int64_t j = 0; j < height; j += VL)
    for (int64_t d = 0; d < round_up(D, D_STEP); d += VL) {
      vf rows[VL];
      for (int i = 0; i < VL; i++)
        rows[i] = j + i < count && d < D ? load_at(at(j + i), d, D) : vf{};
      transpose(rows);
      for (int i = 0; i < VL; i++) store(out + (d + i) * KEY_BLOCK + j, rows[i]);
    }
}

// out[count, Dp] = `count` rows of D elements times `scale`, zero-filled to Dp and to `height` rows.
template <class At>
static void load_rows(const At& at, int64_t count, int64_t height, int64_t D, float scale, float* out) {
  int64_t Dp = round_up(D, D_STEP);
  for (int64_t j = 0; j < height; j++)
    for (int64_t d = 0; d < Dp; d += VL)
      store(out + j * Dp + d, j < count && d < D ? load_at(at(j), d, D) * scale : vf{});
}

// 2^x for x < 127: to about 1 ulp, or where ROUGH 3e-6 off, a thousandth of what rounding to bf16 costs. A minimax
// polynomial on [0, 1).
template <bool ROUGH>
static inline vf vexp2(vf x) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
#else
  const vf magic = splat(12582912.0f), clamped = vmax(x, splat(-126.0f));  // 1.5 * 2^23: adding it rounds
  vf shifted = (clamped - 0.5f) + magic, r = clamped - (shifted - magic);
#endif
  vf p;
  if constexpr (ROUGH) {
    p = fma(r, splat(1.353416791e-2f), splat(5.201146062e-2f));
    p = fma(p, r, splat(2.414427569e-1f));
    p = fma(p, r, splat(6.930038345e-1f));
    p = fma(p, r, splat(1.000002593f));
  } else {
    p = fma(r, splat(2.170225546e-4f), splat(1.243968783e-3f));
    p = fma(p, r, splat(9.678840996e-3f));
    p = fma(p, r, splat(5.548334198e-2f));
    p = fma(p, r, splat(2.402298363e-1f));
    p = fma(p, r, splat(6.931469838e-1f));
    p = fma(p, r, splat(1.0f));
  }
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  vi exponent = ((vi)shifted - (vi)magic + 127) << 23;
  vf result = p * (vf)exponent;
  return x < -126.0f ? vf{} : result;
#endif
}
static inline float exp2_1(float x) {
  return vexp2<false>(vmax(splat(x), splat(-1000.0f)))[0];
}

static inline bool any_above(vf x, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
  return reduce_max(x) > limit;
#endif
}

// The keys that a query sees: [first, last] but for its gap [gap, gap_end), what lies between a prefix that it shares
// and its own sample.
struct Sight {
  int64_t first, last, gap, gap_end;

  bool none_of(int64_t key) const {  // of the block of keys from `key` on
    int64_t from = larger(first, key), to = smaller(last, key + KEY_BLOCK - 1);
    return from > to || (gap <= from && to < gap_end);
  }
  bool all_of(int64_t key) const {
    return first <= key && last >= key + KEY_BLOCK - 1 && (gap >= gap_end || gap >= key + KEY_BLOCK || gap_end <= key);
  }
  vi visible(int64_t key) const {  // the lanes of VL keys from `key` on
    vi position = LANE + (int32_t)key;
    return (position >= (int32_t)first) & (position <= (int32_t)last) &
           ((position < (int32_t)gap) | (position >= (int32_t)gap_end));
  }
};

// Of a window's queries, by token: `gaps` holds pairs, or is null where nobody has one.
static inline Sight sight_of(const int32_t* first_key, const int32_t* gaps, int64_t window_start, int64_t token) {
  return {first_key[token], window_start + token, gaps ? gaps[2 * token] : 0, gaps ? gaps[2 * token + 1] : 0};
}

}  // namespace COSERVE_ISA
}  // namespace coserve
