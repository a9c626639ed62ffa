// AdamW, SGD and the gradient's norm on flat fp32 buffers: each one pass over memory.
#include "parallel.h"
#include "simd.h"

namespace coserve {
namespace COSERVE_ISA {

constexpr int64_t PART = 16384;  // elements of one task

static vf square_root(vf x) {
  for (int i = 0; i < VL; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

static void adamw(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t n,
                  double step_size, double beta1, double beta2, double eps, double decay,
                  double root_correction, double grad_scale) {
  const float keep1 = (float)(1 - beta1), keep2 = (float)(1 - beta2), b2 = (float)beta2;
  const float size = (float)step_size, root = (float)root_correction, e = (float)eps;
  const float shrink = (float)decay, factor = (float)grad_scale;
  parallel_for(divide_up(n, PART), 8.0 * n, [&](int64_t part) {
    for (int64_t i = part * PART, end = smaller(n, (part + 1) * PART); i < end; i += VL) {
      vf g = load_at(grad, i, n) * factor;
      vf m = load_at(exp_avg, i, n), v = load_at(exp_avg_sq, i, n);
      m = fma(g - m, splat(keep1), m);
      v = fma(g * g, splat(keep2), v * b2);
      store_at(exp_avg, m, i, n);
      store_at(exp_avg_sq, v, i, n);
      vf p = load_at(param, i, n) * shrink;
      store_at(param, p - size * (m / (square_root(v) / root + e)), i, n);
    }
  });
}

static void sgd(float* param, const float* grad, float* momentum_buffer, int64_t n, double lr, double momentum,
                double weight_decay, double grad_scale) {
  const float rate = (float)lr, keep = (float)momentum, decay = (float)weight_decay, factor = (float)grad_scale;
  parallel_for(divide_up(n, PART), 4.0 * n, [&](int64_t part) {
    for (int64_t i = part * PART, end = smaller(n, (part + 1) * PART); i < end; i += VL) {
      vf p = load_at(param, i, n), g = fma(p, splat(decay), load_at(grad, i, n) * factor);
      if (momentum_buffer) {
        g = fma(load_at(momentum_buffer, i, n), splat(keep), g);
        store_at(momentum_buffer, g, i, n);
      }
      store_at(param, p - rate * g, i, n);
    }
  });
}

// sums[part]: squares of PART elements in float64, VL sums side by side, added in order.
static void chunk_squares(const float* x, int64_t n, double* sums) {
  typedef double vd __attribute__((vector_size(VL * 8)));
  parallel_for(divide_up(n, PART), 2.0 * n, [&](int64_t part) {
    vd sum{};
    for (int64_t i = part * PART, end = smaller(n, (part + 1) * PART); i < end; i += VL) {
      vd v = __builtin_convertvector(load_at(x, i, n), vd);
      sum += v * v;
    }
    double total = 0;
    for (int i = 0; i < VL; i++) total += sum[i];
    sums[part] = total;
  });
}

void add_optimizer(Kernels& table) {
  table.adamw = adamw;
  table.sgd = sgd;
  table.chunk_squares = chunk_squares;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
