// Cross-entropy in place, and the AdamW update.
#include "parallel.h"
#include "simd.h"

extern "C" float logf(float);

namespace coserve {
namespace COSERVE_ISA {

template <class T>
static float cross_entropy_row(T* row, int64_t target, int64_t V, float grad_scale) {
  vf top = splat(-__builtin_inff());
  for (int64_t i = 0; i + VL <= V; i += VL) top = vmax(load(row + i), top);
  float highest = reduce_max(top);
  for (int64_t i = V / VL * VL; i < V; i++) {
    float z = load_n(row + i, 1)[0];
    highest = z > highest ? z : highest;
  }
  float sum = 0;  // added up a thousand at a time, so that the error does not grow with V
  for (int64_t i = 0; i < V;) {
    vf part{};
    for (int64_t end = smaller(V, i + 1024); i < end; i += VL) {
      vf p = vexp(load_at(row, i, V) - highest);
      if (i + VL > V) p = load_n((float*)&p, V - i);
      part += p;
    }
    sum += reduce_add(part);
  }
  float lse = highest + logf(sum), chosen = load_n(row + target, 1)[0];
  for (int64_t i = 0; i < V; i += VL) store_at(row, vexp(load_at(row, i, V) - lse) * grad_scale, i, V);
  vf peak = (exp1(chosen - lse) - splat(1.0f)) * grad_scale;
  store_n(row + target, peak, 1);
  return lse - chosen;
}

template <class T>
static void cross_entropy_rows(T* logits, const int64_t* targets, int64_t C, int64_t V, float grad_scale,
                               float* losses) {
  parallel_for(C, 8.0 * C * V, [&](int64_t c) {
    T* row = logits + c * V;
    if (targets[c] < 0) {
      memset(row, 0, V * sizeof(T));
      losses[c] = 0;
    } else {
      losses[c] = cross_entropy_row(row, targets[c], V, grad_scale);
    }
  });
}

static void cross_entropy(int64_t dtype, void* logits, const int64_t* targets, int64_t C, int64_t V,
                          double grad_scale, float* losses) {
  if (dtype == 0)
    cross_entropy_rows((float*)logits, targets, C, V, (float)grad_scale, losses);
  else
    cross_entropy_rows((bf16*)logits, targets, C, V, (float)grad_scale, losses);
}

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
  constexpr int64_t PART = 16384;
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

void add_loss(Kernels& table) {
  table.cross_entropy = cross_entropy;
  table.adamw = adamw;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
