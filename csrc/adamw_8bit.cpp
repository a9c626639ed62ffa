// AdamW whose moments lie in blocks of 256 codes of 8 bits (coserve/kernels/adamw_8bit.py has the formula).
#include "parallel.h"
#include "simd.h"

namespace coserve {
namespace COSERVE_ISA {

constexpr int64_t BLOCK = 256;

static vf square_root(vf x) {
  for (int i = 0; i < VL; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// Codes of the block's values, the rest of which are 0; returns their scale. A code is the number of the 255
// ascending edges below the value. `codes_of` has it for the least float with the same upper half, which at most one
// edge parts from the value.
static float quantize(float* values, const float* edges, const uint8_t* codes_of, uint8_t* codes) {
  vf top{};
  for (int64_t i = 0; i < BLOCK; i += VL) {
    vf x = load(values + i);
    top = vmax(x < 0.0f ? -x : x, top);
  }
  const float scale = reduce_max(top), divisor = scale > 0 ? scale : 1.0f;
  for (int64_t i = 0; i < BLOCK; i += VL) store(values + i, load(values + i) / divisor);
  for (int64_t i = 0; i < BLOCK; i++) {
    uint32_t bits;
    memcpy(&bits, values + i, sizeof bits);
    uint32_t code = codes_of[bits >> 16];
    codes[i] = (uint8_t)(code + (edges[code] < values[i]));
  }
  return scale;
}

static void adamw_8bit(float* param, const float* grad, int64_t B, const int64_t* starts, const int64_t* lengths,
                       const float* ratio, uint8_t* m_codes, uint8_t* v_codes, float* m_scale, float* v_scale,
                       const float* signed_map, const float* signed_edges, const uint8_t* signed_codes,
                       const float* unsigned_map, const float* unsigned_edges, const uint8_t* unsigned_codes,
                       double step_size, double beta1, double beta2, double eps, double decay,
                       double root_correction, double grad_scale) {
  const float keep1 = (float)(1 - beta1), keep2 = (float)(1 - beta2), b2 = (float)beta2;
  const float root = (float)root_correction, e = (float)eps, factor = (float)grad_scale;
  constexpr int64_t RUN = 16;  // blocks of one task
  parallel_for(divide_up(B, RUN), 60.0 * B * BLOCK, [&](int64_t run) {
    for (int64_t b = run * RUN, last = smaller(B, (run + 1) * RUN); b < last; b++) {
      uint8_t *mq = m_codes + b * BLOCK, *vq = v_codes + b * BLOCK;
      const float size = (float)step_size * ratio[b], shrink = 1 - (float)decay * ratio[b];
      const float* g_block = grad + starts[b];
      float* p_block = param + starts[b];
      const int64_t n = lengths[b];
      alignas(64) float m_new[BLOCK] = {}, v_new[BLOCK] = {};
      for (int64_t i = 0; i < n; i++) {
        m_new[i] = signed_map[mq[i]] * m_scale[b];
        v_new[i] = unsigned_map[vq[i]] * v_scale[b];
      }
      for (int64_t i = 0; i < n; i += VL) {
        vf g = load_at(g_block, i, n) * factor, m = load(m_new + i), v = load(v_new + i);
        m = fma(g - m, splat(keep1), m);
        v = fma(g * g, splat(keep2), v * b2);
        store(m_new + i, m);
        store(v_new + i, v);
        vf p = load_at(p_block, i, n) * shrink;
        store_at(p_block, p - size * (m / (square_root(v) / root + e)), i, n);
      }
      m_scale[b] = quantize(m_new, signed_edges, signed_codes, mq);
      v_scale[b] = quantize(v_new, unsigned_edges, unsigned_codes, vq);
    }
  });
}

void add_adamw_8bit(Kernels& table) {
  table.adamw_8bit = adamw_8bit;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
