// Log-probabilities of targets and the gradient of a loss over them, in place.
#include "parallel.h"
#include "simd.h"

extern "C" float logf(float);

namespace coserve {
namespace COSERVE_ISA {

template <class T>
static void score_row(const T* row, int64_t target, int64_t V, float* lse, float* logprob, float* mean_logprob,
                      bool* greedy) {
  vf top = splat(-__builtin_inff());
  for (int64_t i = 0; i + VL <= V; i += VL) top = vmax(load(row + i), top);
  float highest = reduce_max(top);
  for (int64_t i = V / VL * VL; i < V; i++) {
    float z = load_n(row + i, 1)[0];
    highest = z > highest ? z : highest;
  }
  float sum = 0, total = 0;  // added up a thousand at a time, so that the error does not grow with V
  for (int64_t i = 0; i < V;) {
    vf part{}, plain{};
    int64_t end = smaller(V, i + 1024);
    for (; i + VL <= end; i += VL) {
      vf z = load(row + i) - highest;
      part += vexp(z);
      plain += z;
    }
    if (i < end) {
      vf z = load_n(row + i, end - i) - highest, p = vexp(z);
      part += load_n((float*)&p, end - i);
      plain += load_n((float*)&z, end - i);
      i = end;
    }
    sum += reduce_add(part);
    total += reduce_add(plain);
  }
  float chosen = load_n(row + target, 1)[0], rest = logf(sum);
  *lse = highest + rest;
  *logprob = chosen - highest - rest;
  *mean_logprob = total / V - rest;
  *greedy = chosen == highest;
  for (int64_t i = 0; i < target && *greedy; i++) *greedy = load_n(row + i, 1)[0] != highest;
}

template <class T>
static void gradient_row(T* row, int64_t target, int64_t V, float lse, float weight, float uniform, float cap) {
  const float both = weight + uniform, off = uniform / V, shrink = cap > 0 ? 1 / cap : 0;
  float chosen = load_n(row + target, 1)[0], z = chosen * shrink;
  vf peak = ((exp1(chosen - lse) - splat(1.0f)) * weight + (exp1(chosen - lse) * uniform - off)) * (1 - z * z);
  for (int64_t i = 0; i < V; i += VL) {
    vf z = load_at(row, i, V), g = vexp(z - lse) * both - off;
    if (cap > 0) g *= 1 - (z * shrink) * (z * shrink);
    store_at(row, g, i, V);
  }
  store_n(row + target, peak, 1);
}

template <class F>
static void each_row(int64_t dtype, void* logits, int64_t C, int64_t V, F work) {
  parallel_for(C, 8.0 * C * V, [&](int64_t c) {
    if (dtype == 0)
      work((float*)logits + c * V, c);
    else
      work((bf16*)logits + c * V, c);
  });
}

static void token_scores(int64_t dtype, const void* logits, const int64_t* targets, int64_t C, int64_t V,
                         float* lse, float* logprob, float* mean_logprob, bool* greedy) {
  each_row(dtype, (void*)logits, C, V, [&](auto* row, int64_t c) {
    score_row(row, targets[c], V, lse + c, logprob + c, mean_logprob + c, greedy + c);
  });
}

static void logit_gradient(int64_t dtype, void* logits, const int64_t* targets, int64_t C, int64_t V,
                           const float* lse, const float* weight, const float* uniform, double cap) {
  each_row(dtype, logits, C, V, [&](auto* row, int64_t c) {
    gradient_row(row, targets[c], V, lse[c], weight[c], uniform[c], (float)cap);
  });
}

void add_loss(Kernels& table) {
  table.token_scores = token_scores;
  table.logit_gradient = logit_gradient;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
