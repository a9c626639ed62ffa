// Blocks of keys and values as fp32, shared by attention and its backward.
#pragma once
#include "parallel.h"
#include "tile.h"

namespace coserve {
namespace COSERVE_ISA {

constexpr int64_t KEY_BLOCK = 64;
constexpr int64_t D_STEP = 16;  // head dims are padded to this in scratch

#if defined(__AVX512F__)
static const vi LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
static const vi LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#else
static const vi LANE = {0, 1, 2, 3};
#endif

template <int STEP>
static inline void exchange(vf* rows) {  // swaps the off-diagonal STEP x STEP blocks
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

static inline void transpose(vf* rows) {  // VL x VL
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

// The lanes of a block's VL keys from `key` on that lie in [first, last].
static inline vi visible(int64_t key, int64_t first, int64_t last) {
  vi position = LANE + (int32_t)key;
  return (position >= (int32_t)first) & (position <= (int32_t)last);
}

}  // namespace COSERVE_ISA
}  // namespace coserve
