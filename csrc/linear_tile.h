// Register tiles of the base products: some rows of A by some panels of B, over one block of depth. Each is a struct
// with the sizes that linear.cpp blocks by, made once for a block, and `multiply`. Depths up to UNCUT (forward,
// transposed) are one block, larger ones are cut every DEPTH; STEP divides what a tile multiplies.
#pragma once
#include "weight_pack.h"

namespace coserve {
namespace COSERVE_ISA {

// Sums of the blocks before lie in `sums`; after the last block bias joins them and they are rounded to T.
template <class E, class T>
struct TileStep {
  int64_t depth;  // elements of a row of A, a multiple of the tile's STEP
  const E* a;
  int64_t a_stride;
  const E* b;  // panels, b_stride apart
  int64_t b_stride;
  float* sums;
  int64_t sums_stride;
  bool first, last;
  const T* bias;  // or null; like `out` it begins at the tile's first column
  T* out;
  int64_t out_stride, columns;  // of `out` from here on
};

constexpr int PANEL_VECTORS = PANEL / VL;

template <class E, class T>
static inline void finish_vector(const TileStep<E, T>& s, int64_t row, int64_t column, vf sum) {
  if (!s.last) {
    store(s.sums + row * s.sums_stride + column, sum);
  } else if (column < s.columns) {
    if (s.bias) sum += load_at(s.bias, column, s.columns);
    store_at(s.out + row * s.out_stride, sum, column, s.columns);
  }
}

template <class Tile, int P, class S>
static inline void tile_of_rows(int64_t rows, const S& s) {
  switch (rows) {
    case 1: return Tile::template run<1, P>(s);
    case 2: return Tile::template run<2, P>(s);
    case 3: if constexpr (Tile::ROWS >= 3) return Tile::template run<3, P>(s); break;
    case 4: if constexpr (Tile::ROWS >= 4) return Tile::template run<4, P>(s); break;
    case 5: if constexpr (Tile::ROWS >= 5) return Tile::template run<5, P>(s); break;
    case 6: if constexpr (Tile::ROWS >= 6) return Tile::template run<6, P>(s); break;
    case 7: if constexpr (Tile::ROWS >= 7) return Tile::template run<7, P>(s); break;
    case 8: if constexpr (Tile::ROWS >= 8) return Tile::template run<8, P>(s); break;
    case 9: if constexpr (Tile::ROWS >= 9) return Tile::template run<9, P>(s); break;
    case 10: if constexpr (Tile::ROWS >= 10) return Tile::template run<10, P>(s); break;
    case 11: if constexpr (Tile::ROWS >= 11) return Tile::template run<11, P>(s); break;
    case 12: if constexpr (Tile::ROWS >= 12) return Tile::template run<12, P>(s); break;
  }
}

// A tile of at most Tile::ROWS rows and Tile::PANELS panels.
template <class Tile, class S>
static void run_tile(int64_t rows, int64_t panels, const S& s) {
  switch (panels) {
    case 1: return tile_of_rows<Tile, 1>(rows, s);
    case 2: if constexpr (Tile::PANELS >= 2) return tile_of_rows<Tile, 2>(rows, s); break;
    case 3: if constexpr (Tile::PANELS >= 3) return tile_of_rows<Tile, 3>(rows, s); break;
    case 4: if constexpr (Tile::PANELS >= 4) return tile_of_rows<Tile, 4>(rows, s); break;
  }
}

// fp32: a block's products are one chain of multiply-adds over ascending k, the blocks' sums are added in order.
// bf16 weights and rows come here widened where the CPU has no dot products of pairs.
struct FloatTile {
  typedef float Element;
#if defined(__AVX512F__)
  static constexpr int ROWS = 6, PANELS = 4;
#elif defined(__AVX2__)
  static constexpr int ROWS = 6, PANELS = 1;
#else
  static constexpr int ROWS = 2, PANELS = 1;
#endif
  static constexpr int64_t STEP = 1, DEPTH[2] = {256, 256}, UNCUT[2] = {256, 256};

  template <class T>
  void multiply(int64_t rows, int64_t panels, const TileStep<float, T>& s) const {
    run_tile<FloatTile>(rows, panels, s);
  }

  template <int R, int P, class T>
  static inline void run(const TileStep<float, T>& s) {
    constexpr int V = P * PANEL_VECTORS;
    vf sum[R][V] = {};
    const float *a = s.a, *b = s.b;
    const int64_t a_stride = s.a_stride, b_stride = s.b_stride;
#pragma GCC unroll 2
    for (int64_t k = 0; k < s.depth; k++, a++, b += PANEL) {
      vf column[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++)
        column[v] = load(b + v / PANEL_VECTORS * b_stride + v % PANEL_VECTORS * VL);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        vf x = splat(a[r * a_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = fma(x, column[v], sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++)
        finish_vector(s, r, v * VL, s.first ? sum[r][v] : load(s.sums + r * s.sums_stride + v * VL) + sum[r][v]);
  }
};

#if defined(__AVX512BF16__)
// bf16 on vdpbf16ps: every element is one chain of dot products over ascending pairs of k. 24 sums in all: six rows of
// four panels, or more rows of fewer, so that a batch which is decoded reads the weights once.
template <int MOST_ROWS, int MOST_PANELS>
struct PairTile {
  typedef bf16 Element;
  static constexpr int ROWS = MOST_ROWS, PANELS = MOST_PANELS;
  static constexpr int64_t STEP = 2, DEPTH[2] = {1024, 256}, UNCUT[2] = {1024, 512};

  void multiply(int64_t rows, int64_t panels, const TileStep<bf16, bf16>& s) const {
    run_tile<PairTile>(rows, panels, s);
  }

  template <int R, int P>
  static inline void run(const TileStep<bf16, bf16>& s) {
    __m512 sum[R][P];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++)
        sum[r][p] = s.first ? _mm512_setzero_ps() : _mm512_loadu_ps(s.sums + r * s.sums_stride + p * PANEL);
    const bf16 *a = s.a, *b = s.b;
    const int64_t a_stride = s.a_stride, b_stride = s.b_stride;
#pragma GCC unroll 2
    for (int64_t pair = s.depth / 2; pair; pair--, a += 2, b += 2 * PANEL) {
      __m512bh column[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) column[p] = (__m512bh)_mm512_loadu_si512(b + p * b_stride);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        int32_t two;
        memcpy(&two, a + r * a_stride, sizeof two);
        __m512bh x = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], x, column[p]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) finish_vector(s, r, p * PANEL, (vf)sum[r][p]);
  }
};
#endif

}  // namespace COSERVE_ISA
}  // namespace coserve
