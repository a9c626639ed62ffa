// C = A B on register tiles: the one inner loop of the linear, attention and LoRA kernels. Every element of C
// is one chain of multiply-adds over ascending k, whatever the tile it falls into.
#pragma once
#include "simd.h"

namespace coserve {
namespace COSERVE_ISA {

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 8, TILE_VECTORS = 3;
#elif defined(__AVX2__)
constexpr int TILE_ROWS = 4, TILE_VECTORS = 3;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;
#endif

// How far ahead B is fetched, in floats: few rows stream B from memory faster than the hardware's prefetcher
// follows (1.3x at 8 rows).
constexpr int64_t PREFETCH = 512;

enum class Into { SET, RESUME, ADD };  // C = sum; the chain starts from C; C += sum

// A's element (row, k) is A[row * row_stride + k * k_stride]; B is [K, >= columns], C [rows, >= columns].
struct TileArgs {
  int64_t K;
  const float* A;
  int64_t row_stride, k_stride;
  const float* B;
  int64_t ldb;
  float* C;
  int64_t ldc;
  Into into;
};

template <int ROWS, int VECTORS>
static inline void tile(const TileArgs& t) {
  vf sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++)
      sum[r][v] = t.into == Into::RESUME ? load(t.C + r * t.ldc + v * VL) : vf{};
  const float *a = t.A, *b = t.B;
  const int64_t row_stride = t.row_stride, k_stride = t.k_stride, ldb = t.ldb;
#pragma GCC unroll 2
  for (int64_t k = 0; k < t.K; k++, a += k_stride, b += ldb) {
    vf column[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      column[v] = load(b + v * VL);
      __builtin_prefetch(b + v * VL + PREFETCH);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      vf x = splat(a[r * row_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[r][v] = fma(x, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      float* c = t.C + r * t.ldc + v * VL;
      store(c, t.into == Into::ADD ? load(c) + sum[r][v] : sum[r][v]);
    }
}

template <int VECTORS>
static inline void tile_rows(int64_t rows, const TileArgs& t) {
  switch (rows) {
    case 1: return tile<1, VECTORS>(t);
    case 2: return tile<2, VECTORS>(t);
    case 3: return tile<3, VECTORS>(t);
    case 4: return tile<4, VECTORS>(t);
#if defined(__AVX512F__)
    case 5: return tile<5, VECTORS>(t);
    case 6: return tile<6, VECTORS>(t);
    case 7: return tile<7, VECTORS>(t);
    case 8: return tile<8, VECTORS>(t);
#endif
  }
}

// Any number of rows; `columns` a multiple of VL.
static inline void matmul(int64_t rows, int64_t columns, const TileArgs& args) {
  TileArgs t = args;
  for (int64_t n = 0; n < columns;) {
    int64_t left = (columns - n) / VL, strips = (left + TILE_VECTORS - 1) / TILE_VECTORS;
    int64_t vectors = (left + strips - 1) / strips;  // 4 vectors are 2 + 2, not 3 + 1
    t.B = args.B + n;
    for (int64_t m = 0; m < rows;) {
      int64_t tiles_left = (rows - m + TILE_ROWS - 1) / TILE_ROWS;
      int64_t height = (rows - m + tiles_left - 1) / tiles_left;  // 9 rows are 5 + 4, not 8 + 1
      t.A = args.A + m * args.row_stride;
      t.C = args.C + m * args.ldc + n;
      if (vectors == 1) tile_rows<1>(height, t);
      if (vectors == 2) tile_rows<2>(height, t);
      if (vectors == 3) tile_rows<3>(height, t);
      m += height;
    }
    n += vectors * VL;
  }
}

}  // namespace COSERVE_ISA
}  // namespace coserve
