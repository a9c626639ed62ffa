// Norms, rotary embedding, gated activation and the cache write: each a pass over rows.
#include "parallel.h"
#include "simd.h"

namespace coserve {
namespace COSERVE_ISA {

static float inverse_rms(float sum, int64_t H, double eps) {
  return 1.0f / __builtin_sqrtf(sum / (float)H + (float)eps);
}

template <class T>
static vf rounded(vf x) {  // x as it would be after a store to T
  T buffer[VL];
  store(buffer, x);
  return load(buffer);
}

// Weights of x's own type multiply the rounded norm (Llama); fp32 weights beside bf16 come before it (Gemma).
template <class T, class W>
static void norm_rows(const T* x, int64_t x_stride, int64_t inner, const T* residual, const W* w, int64_t rows,
                      int64_t H, double eps, T* sum_out, T* y) {
  parallel_rows(rows, 8.0 * rows * H, [&](int64_t t) {
    const T* row = x + t / inner * x_stride + t % inner * H;  // `inner` rows lie together (heads of a token)
    vf sum{};
    if (residual) {
      for (int64_t i = 0; i < H; i += VL) {
        vf v = load_at(row, i, H) + load_at(residual + t * H, i, H);
        store_at(sum_out + t * H, v, i, H);
      }
      row = sum_out + t * H;
    }
    for (int64_t i = 0; i < H; i += VL) {
      vf v = load_at(row, i, H);
      sum = fma(v, v, sum);
    }
    float r = inverse_rms(reduce_add(sum), H, eps);
    for (int64_t i = 0; i < H; i += VL) {
      vf normed = load_at(row, i, H) * r;
      if constexpr (sizeof(T) == sizeof(W)) normed = rounded<T>(normed);
      store_at(y + t * H, normed * load_at(w, i, H), i, H);
    }
  });
}

static void rms_norm(int64_t dtype, const void* x, int64_t x_stride, int64_t inner, const void* residual,
                     const void* w, int64_t T, int64_t H, double eps, void* sum, void* y) {
  if (dtype == 0)
    norm_rows((const float*)x, x_stride, inner, (const float*)residual, (const float*)w, T, H, eps, (float*)sum,
              (float*)y);
  else if (dtype == 1)
    norm_rows((const bf16*)x, x_stride, inner, (const bf16*)residual, (const bf16*)w, T, H, eps, (bf16*)sum,
              (bf16*)y);
  else
    norm_rows((const bf16*)x, x_stride, inner, (const bf16*)residual, (const float*)w, T, H, eps, (bf16*)sum,
              (bf16*)y);
}

template <class T, class W>
static void norm_backward_rows(const T* dy, const T* x, const W* w, int64_t rows, int64_t H, double eps,
                               T* dx) {
  parallel_rows(rows, 12.0 * rows * H, [&](int64_t t) {
    const T *xr = x + t * H, *dyr = dy + t * H;
    vf squares{}, products{};
    for (int64_t i = 0; i < H; i += VL) {
      vf v = load_at(xr, i, H), g = load_at(dyr, i, H) * load_at(w, i, H);
      squares = fma(v, v, squares);
      products = fma(g, v, products);
    }
    float r = inverse_rms(reduce_add(squares), H, eps);
    float along = reduce_add(products) / (float)H * r * r;
    for (int64_t i = 0; i < H; i += VL) {
      vf v = load_at(xr, i, H), g = load_at(dyr, i, H) * load_at(w, i, H);
      store_at(dx + t * H, (g - v * along) * r, i, H);
    }
  });
}

static void rms_norm_backward(int64_t dtype, const void* dy, const void* x, const void* w, int64_t T,
                              int64_t H, double eps, void* dx) {
  if (dtype == 0)
    norm_backward_rows((const float*)dy, (const float*)x, (const float*)w, T, H, eps, (float*)dx);
  else if (dtype == 1)
    norm_backward_rows((const bf16*)dy, (const bf16*)x, (const bf16*)w, T, H, eps, (bf16*)dx);
  else
    norm_backward_rows((const bf16*)dy, (const bf16*)x, (const float*)w, T, H, eps, (bf16*)dx);
}

template <class T>
static void rope_rows(T* x, int64_t x_stride, int64_t rows, int64_t N, int64_t D, const int64_t* positions,
                      const float* cos, const float* sin, int64_t half, float sign) {
  parallel_rows(rows, 4.0 * rows * N * D, [&](int64_t t) {
    const float *c = cos + positions[t] * half, *s = sin + positions[t] * half;
    for (int64_t n = 0; n < N; n++) {
      T *first = x + t * x_stride + n * D, *second = first + half;
      for (int64_t i = 0; i < half; i += VL) {
        vf x1 = load_at(first, i, half), x2 = load_at(second, i, half);
        vf cv = load_at(c, i, half), sv = load_at(s, i, half) * sign;
        store_at(first, x1 * cv - x2 * sv, i, half);
        store_at(second, x2 * cv + x1 * sv, i, half);
      }
    }
  });
}

static void rope(int64_t dtype, void* x, int64_t x_stride, int64_t T, int64_t N, int64_t D,
                 const int64_t* positions, const float* cos, const float* sin, int64_t half,
                 int64_t inverse) {
  float sign = inverse ? -1.0f : 1.0f;
  if (dtype == 0)
    rope_rows((float*)x, x_stride, T, N, D, positions, cos, sin, half, sign);
  else
    rope_rows((bf16*)x, x_stride, T, N, D, positions, cos, sin, half, sign);
}

// act(gate) and its slope; GELU's tanh form is x * sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3).
static inline void activate(vf gate, int64_t act, vf* value, vf* slope) {
  if (act == 0) {
    vf s = sigmoid(gate);
    *value = gate * s;
    *slope = s * (1.0f + gate * (1.0f - s));
    return;
  }
  const float root = 1.5957691216f, cubic = 0.044715f;  // 2 sqrt(2/pi)
  vf square = gate * gate;
  vf s = sigmoid(root * gate * (1.0f + cubic * square));
  *value = gate * s;
  *slope = s + gate * s * (1.0f - s) * root * (1.0f + 3 * cubic * square);
}

template <class T>
static void swiglu_rows(const T* gate_up, int64_t rows, int64_t I, int64_t act, T* y) {
  parallel_rows(rows, 10.0 * rows * I, [&](int64_t t) {
    const T *gate = gate_up + t * 2 * I, *up = gate + I;
    for (int64_t i = 0; i < I; i += VL) {
      vf value, slope;
      activate(load_at(gate, i, I), act, &value, &slope);
      store_at(y + t * I, value * load_at(up, i, I), i, I);
    }
  });
}

static void swiglu(int64_t dtype, const void* gate_up, int64_t T, int64_t I, int64_t act, void* y) {
  if (dtype == 0)
    swiglu_rows((const float*)gate_up, T, I, act, (float*)y);
  else
    swiglu_rows((const bf16*)gate_up, T, I, act, (bf16*)y);
}

template <class T>
static void swiglu_backward_rows(const T* dy, const T* gate_up, int64_t rows, int64_t I, int64_t act,
                                 T* dgate_up) {
  parallel_rows(rows, 12.0 * rows * I, [&](int64_t t) {
    const T *gate = gate_up + t * 2 * I, *up = gate + I;
    T *dgate = dgate_up + t * 2 * I, *dup = dgate + I;
    for (int64_t i = 0; i < I; i += VL) {
      vf value, slope, d = load_at(dy + t * I, i, I);
      activate(load_at(gate, i, I), act, &value, &slope);
      store_at(dgate, d * load_at(up, i, I) * slope, i, I);
      store_at(dup, d * value, i, I);
    }
  });
}

static void swiglu_backward(int64_t dtype, const void* dy, const void* gate_up, int64_t T, int64_t I,
                            int64_t act, void* dgate_up) {
  if (dtype == 0)
    swiglu_backward_rows((const float*)dy, (const float*)gate_up, T, I, act, (float*)dgate_up);
  else
    swiglu_backward_rows((const bf16*)dy, (const bf16*)gate_up, T, I, act, (bf16*)dgate_up);
}

template <class T>
static void soft_cap_values(T* x, int64_t n, float cap) {
  constexpr int64_t CHUNK = 4096;
  parallel_for(divide_up(n, CHUNK), 20.0 * n, [&](int64_t chunk) {
    int64_t end = smaller(n, (chunk + 1) * CHUNK);
    for (int64_t i = chunk * CHUNK; i < end; i += VL)
      store_at(x, cap * vtanh(load_at(x, i, end) / cap), i, end);
  });
}

static void soft_cap(int64_t dtype, void* x, int64_t n, double cap) {
  if (dtype == 0)
    soft_cap_values((float*)x, n, (float)cap);
  else
    soft_cap_values((bf16*)x, n, (float)cap);
}

static void kv_store(int64_t element_size, const void* k, int64_t k_stride, const void* v, int64_t v_stride,
                     void* k_cache, int64_t k_block_stride, void* v_cache, int64_t v_block_stride,
                     const int64_t* slots, int64_t T, int64_t row, int64_t block_size) {
  auto copy = [&](const void* from, int64_t stride, void* cache, int64_t block_stride, int64_t t) {
    int64_t target = slots[t] / block_size * block_stride + slots[t] % block_size * row;
    memcpy((char*)cache + target * element_size, (const char*)from + t * stride * element_size,
           row * element_size);
  };
  parallel_rows(T, (double)T * row, [&](int64_t t) {
    if (slots[t] < 0) return;
    copy(k, k_stride, k_cache, k_block_stride, t);
    copy(v, v_stride, v_cache, v_block_stride, t);
  });
}

void add_elementwise(Kernels& table) {
  table.rms_norm = rms_norm;
  table.rms_norm_backward = rms_norm_backward;
  table.rope = rope;
  table.swiglu = swiglu;
  table.swiglu_backward = swiglu_backward;
  table.soft_cap = soft_cap;
  table.kv_store = kv_store;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
