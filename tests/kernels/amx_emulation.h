// AMX's tile instructions in software, by the Operation sections of Intel's manual, for the calling thread. Included
// before csrc/linear.cpp, which is then compiled for AMX on any machine. What faults there aborts here.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

struct Tiles {
  bool configured = false;
  int rows[8] = {}, row_bytes[8] = {};
  unsigned char data[8][16][64] = {};
};
inline thread_local Tiles tiles;

inline void require(bool condition) {
  if (!condition) std::abort();
}

inline float flushed(float x) {  // denormals are zero, as inputs and as results
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

inline float widened(const unsigned char* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  uint32_t bits = (uint32_t)half << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return flushed(value);
}

inline void load_config(const void* memory) {
  const unsigned char* p = (const unsigned char*)memory;
  require((uintptr_t)memory % 64 == 0 && p[0] == 1 && p[1] == 0);
  for (int i = 2; i < 16; i++) require(p[i] == 0);
  tiles = Tiles{};
  tiles.configured = true;
  for (int i = 0; i < 16; i++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, p + 16 + 2 * i, 2);
    int rows = p[48 + i];
    require(row_bytes <= 64 && rows <= 16 && (rows == 0) == (row_bytes == 0) && (i < 8 || rows == 0));
    if (i < 8) tiles.rows[i] = rows, tiles.row_bytes[i] = row_bytes;
  }
}

inline void release() {
  tiles = Tiles{};
}

inline void require_tile(int t) {
  require(tiles.configured && tiles.rows[t] > 0);
}

inline void zero(int t) {
  require_tile(t);
  std::memset(tiles.data[t], 0, sizeof tiles.data[t]);
}

inline void load(int t, const void* base, int64_t stride) {
  zero(t);
  for (int r = 0; r < tiles.rows[t]; r++)
    std::memcpy(tiles.data[t][r], (const char*)base + r * stride, tiles.row_bytes[t]);
}

inline void store(int t, void* base, int64_t stride) {
  require_tile(t);
  for (int r = 0; r < tiles.rows[t]; r++)
    std::memcpy((char*)base + r * stride, tiles.data[t][r], tiles.row_bytes[t]);
}

// TDPBF16PS: sums of the even and of the odd elements from zero, by fused multiply-adds; both together, then onto C.
inline void dot_pairs(int c, int a, int b) {
  require_tile(c), require_tile(a), require_tile(b);
  require(c != a && c != b && a != b);
  require(tiles.rows[c] == tiles.rows[a] && tiles.row_bytes[c] == tiles.row_bytes[b]);
  require(tiles.row_bytes[a] / 4 == tiles.rows[b]);
  for (int m = 0; m < tiles.rows[c]; m++)
    for (int n = 0; n < tiles.row_bytes[c] / 4; n++) {
      float sum[2] = {0.0f, 0.0f}, total;
      for (int k = 0; k < tiles.row_bytes[a] / 4; k++)
        for (int i = 0; i < 2; i++)
          sum[i] = flushed(std::fma(widened(tiles.data[a][m] + 4 * k + 2 * i),
                                    widened(tiles.data[b][k] + 4 * n + 2 * i), sum[i]));
      std::memcpy(&total, tiles.data[c][m] + 4 * n, 4);
      total = flushed(flushed(total) + flushed(sum[0] + sum[1]));
      std::memcpy(tiles.data[c][m] + 4 * n, &total, 4);
    }
}

}  // namespace amx_emulation

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd(t, base, stride) amx_emulation::load(t, base, stride)
#define _tile_stored(t, base, stride) amx_emulation::store(t, base, stride)
#define _tile_zero(t) amx_emulation::zero(t)
#define _tile_dpbf16ps(c, a, b) amx_emulation::dot_pairs(c, a, b)
#define _tile_loadconfig(memory) amx_emulation::load_config(memory)
#define _tile_release() amx_emulation::release()
#define __AMX_BF16__ 1
