// The bf16 base products on AMX's tiles: 32 x 32 sums, 32 of k at a time, B's tiles straight from the panels. Every
// element is one chain over ascending k in steps of 32, wherever in a tile it lies.
#pragma once
#include "linear_tile.h"
#if defined(__AMX_BF16__)
#include <immintrin.h>

namespace coserve {
namespace COSERVE_ISA {

// What was written lies in memory before tile instructions read it: their intrinsics don't tell the compiler.
static inline void written(const void* memory) {
  asm volatile("" ::"r"(memory) : "memory");
}

// Tiles 0 to 3 are C (upper left, upper right, lower left, lower right), 4 and 5 are A, 6 and 7 B.
struct AmxTile {
  typedef bf16 Element;
  static constexpr int ROWS = 32, PANELS = 2, HALF = 16;
  static constexpr int64_t STEP = 32, DEPTH[2] = {512, 512}, UNCUT[2] = {1024, 1024};

  ~AmxTile() {
    if (configured) _tile_release();
  }

  void multiply(int64_t rows, int64_t panels, const TileStep<bf16, bf16>& s) {
    if (rows != configured) configure(rows);
    if (rows > HALF)
      panels > 1 ? run<2, 2>(rows, s) : run<2, 1>(rows, s);
    else
      panels > 1 ? run<1, 2>(rows, s) : run<1, 1>(rows, s);
  }

 private:
  int64_t configured = 0;  // rows

  void configure(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    int64_t upper = smaller(rows, HALF), lower = rows - upper;
    const int64_t of_tile[8] = {upper, upper, lower, lower, upper, lower, HALF, HALF};
    for (int i = 0; i < 8; i++) {
      config.rows[i] = (uint8_t)of_tile[i];
      config.row_bytes[i] = of_tile[i] ? 64 : 0;
    }
    written(&config);
    _tile_loadconfig(&config);
    configured = rows;
  }

  template <int R, int P>
  static void run(int64_t rows, const TileStep<bf16, bf16>& s) {
    alignas(64) float result[ROWS * PANELS * PANEL];
    const int64_t width = PANELS * PANEL, sums_bytes = s.sums_stride * sizeof(float);
    float* lower = s.sums + HALF * s.sums_stride;
    written(s.a);
    if (s.first) {
      _tile_zero(0);
      if constexpr (P > 1) _tile_zero(1);
      if constexpr (R > 1) _tile_zero(2);
      if constexpr (R > 1 && P > 1) _tile_zero(3);
    } else {
      _tile_loadd(0, s.sums, sums_bytes);
      if constexpr (P > 1) _tile_loadd(1, s.sums + PANEL, sums_bytes);
      if constexpr (R > 1) _tile_loadd(2, lower, sums_bytes);
      if constexpr (R > 1 && P > 1) _tile_loadd(3, lower + PANEL, sums_bytes);
    }
    const bf16 *a = s.a, *b = s.b;
    const int64_t a_bytes = s.a_stride * sizeof(bf16);
    for (int64_t k = 0; k < s.depth; k += STEP, a += STEP, b += STEP * PANEL) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (P > 1) {
        _tile_loadd(7, b + s.b_stride, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (R > 1) {
        _tile_loadd(5, a + HALF * s.a_stride, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (R > 1 && P > 1) _tile_dpbf16ps(3, 5, 7);
    }
    float* to = s.last ? result : s.sums;
    const int64_t stride = s.last ? width : s.sums_stride, bytes = stride * sizeof(float);
    _tile_stored(0, to, bytes);
    if constexpr (P > 1) _tile_stored(1, to + PANEL, bytes);
    if constexpr (R > 1) _tile_stored(2, to + HALF * stride, bytes);
    if constexpr (R > 1 && P > 1) _tile_stored(3, to + HALF * stride + PANEL, bytes);
    if (s.last)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < P * PANEL; c += VL) finish_vector(s, r, c, load(result + r * width + c));
  }
};

}  // namespace COSERVE_ISA
}  // namespace coserve
#endif
