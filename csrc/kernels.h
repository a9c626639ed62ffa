// What every instruction set level offers: one table of functions over raw pointers. Strides are in elements.
// `dtype` is 0 for fp32, 1 for bf16, and is that of every pointer declared void*.
#pragma once
#include <cstddef>
#include <cstdint>

namespace coserve {

struct Kernels {
  // linear.cpp
  void (*pack_weight)(int64_t dtype, const void* w, int64_t stride, int64_t first, int64_t count, int64_t K,
                      void* pack);
  void (*gather_rows)(int64_t dtype, const void* pack, int64_t K, const int64_t* rows, int64_t count, void* out);
  void (*linear)(int64_t dtype, int64_t transposed, const void* a, int64_t a_stride, int64_t M, const void* pack,
                 int64_t N, int64_t K, const void* bias, void* out, int64_t out_stride);
  // attention.cpp
  void (*paged_attention)(int64_t dtype, const void* q, int64_t q_stride, const void* k, const void* v,
                          int64_t k_block_stride, int64_t v_block_stride, int64_t block_size,
                          const int32_t* tables, int64_t table_stride, const int32_t* query_start,
                          const int32_t* context_lens, int64_t S, int64_t N, int64_t Nkv, int64_t D,
                          double scale, int64_t window, double cap, void* o);
  void (*window_attention)(int64_t dtype, const void* q, int64_t q_stride, const void* k, int64_t k_stride,
                           const void* v, int64_t v_stride, const int32_t* first_key, const int32_t* gaps,
                           int64_t window_start, int64_t W, int64_t N, int64_t Nkv, int64_t D, double scale,
                           double cap, void* o, float* lse);
  // attention_backward.cpp
  void (*window_attention_backward)(int64_t dtype, const void* dout, int64_t dout_stride, const void* q,
                                    int64_t q_stride, const void* o, int64_t o_stride, const float* lse,
                                    const void* k, int64_t k_stride, const void* v, int64_t v_stride,
                                    const int32_t* first_key, const int32_t* gaps, int64_t window_start, int64_t W,
                                    int64_t N, int64_t Nkv, int64_t D, double scale, double cap, float* dk,
                                    float* dv, void* dq);
  // lora.cpp; `modules` are those of a merged product: int64 [M][6] of a, b, first column of y, columns, line of
  // `ranks` [lines, S] and salt; in the backward [M][9] of a, b, first column, columns, rank, rows, da, db and salt
  void (*lora_forward)(int64_t dtype, void* y, int64_t y_stride, const void* x, int64_t x_stride,
                       const int64_t* modules, int64_t M, const int32_t* token_start, const int32_t* token_end,
                       const int32_t* row_offset, const int32_t* rows, const int32_t* ranks, const int64_t* keys,
                       const double* rates, int64_t S, int64_t K);
  void (*lora_backward)(int64_t dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                        const int64_t* modules, int64_t M, void* dx, int64_t dx_stride, int64_t token_offset,
                        const int64_t* keys, const double* rates, int64_t T, int64_t K);
  // elementwise.cpp; the norms' dtype 2 is bf16 with fp32 weights
  void (*rms_norm)(int64_t dtype, const void* x, int64_t x_stride, int64_t inner, const void* residual,
                   const void* w, int64_t T, int64_t H, double eps, void* sum, void* y);
  void (*rms_norm_backward)(int64_t dtype, const void* dy, const void* x, const void* w, int64_t T,
                            int64_t H, double eps, void* dx);
  void (*rope)(int64_t dtype, void* x, int64_t x_stride, int64_t T, int64_t N, int64_t D,
               const int64_t* positions, const float* cos, const float* sin, int64_t half, int64_t inverse);
  void (*swiglu)(int64_t dtype, const void* gate_up, int64_t T, int64_t I, int64_t act, void* y);
  void (*swiglu_backward)(int64_t dtype, const void* dy, const void* gate_up, int64_t T, int64_t I,
                          int64_t act, void* dgate_up);
  void (*soft_cap)(int64_t dtype, void* x, int64_t n, double cap);
  void (*kv_store)(int64_t element_size, const void* k, int64_t k_stride, const void* v, int64_t v_stride,
                   void* k_cache, int64_t k_block_stride, void* v_cache, int64_t v_block_stride,
                   const int64_t* slots, int64_t T, int64_t row, int64_t block_size);
  // loss.cpp
  void (*token_scores)(int64_t dtype, const void* logits, const int64_t* targets, int64_t C, int64_t V,
                       float* lse, float* logprob, float* mean_logprob, bool* greedy);
  void (*logit_gradient)(int64_t dtype, void* logits, const int64_t* targets, int64_t C, int64_t V,
                         const float* lse, const float* weight, const float* uniform, double cap);
  // optimizer.cpp
  void (*adamw)(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t n,
                double step_size, double beta1, double beta2, double eps, double decay,
                double root_correction, double grad_scale);
  void (*sgd)(float* param, const float* grad, float* momentum_buffer, int64_t n, double lr, double momentum,
              double weight_decay, double grad_scale);
  void (*chunk_squares)(const float* x, int64_t n, double* sums);
  // sampling.cpp
  void (*choose_tokens)(int64_t dtype, const void* logits, int64_t stride, const int64_t* rows, int64_t R, int64_t V,
                        const double* temperature, const int64_t* top_k, const double* top_p, const double* min_p,
                        const double* number, int64_t* ids);
  void (*token_logprobs)(int64_t dtype, const void* logits, int64_t stride, const int64_t* rows, int64_t R, int64_t V,
                         const int64_t* targets, int64_t top, float* logprobs, int64_t* ranks, int64_t* top_ids,
                         float* top_logprobs);
  void (*penalize)(float* logits, int64_t V, const int64_t* ids, int64_t n, int64_t prompt, double repetition,
                   double presence, double frequency);
  // adamw_8bit.cpp
  void (*adamw_8bit)(float* param, const float* grad, int64_t B, const int64_t* starts, const int64_t* lengths,
                     const float* ratio, uint8_t* m_codes, uint8_t* v_codes, float* m_scale, float* v_scale,
                     const float* signed_map, const float* signed_edges, const uint8_t* signed_codes,
                     const float* unsigned_map, const float* unsigned_edges, const uint8_t* unsigned_codes,
                     double step_size, double beta1, double beta2, double eps,
                     double decay, double root_correction, double grad_scale);
};

namespace plain {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512bf16 {
const Kernels& kernels();
}
namespace amx {
const Kernels& kernels();
}

// Memory of the calling thread, at least `bytes` long and 64-byte aligned, kept until the thread ends; a call
// for the same slot may move it. Slot 0 is a task's own, slot 1 the caller's for a whole operation, slot 2 that of a
// helper which a task calls.
void* scratch(int slot, size_t bytes);

}  // namespace coserve
