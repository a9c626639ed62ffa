// Dropout masks from counters; the same bits as coserve/kernels/dropout.py, which has the formula.
#pragma once
#include "simd.h"

namespace coserve {
namespace COSERVE_ISA {

// One row's mask in one module.
struct RowMask {
  uint32_t low, high, threshold;

  RowMask(int64_t key, int64_t salt, double rate) : threshold((uint32_t)(rate * 4294967296.0)) {
    uint64_t x = (uint64_t)(key ^ salt) + 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
    low = (uint32_t)x;
    high = (uint32_t)(x >> 32);
  }

  // All ones where feature `first` + lane stays, else 0.
  vu keep(int64_t first) const {
    vu x;
    for (int i = 0; i < VL; i++) x[i] = (uint32_t)i * 0x9E3779B1u;
    x += (uint32_t)first * 0x9E3779B1u + low;
    x = (x ^ (x >> 16)) * 0x7FEB352Du + high;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x ^= x >> 16;
    return (vu)(x >= threshold);
  }
};

static inline vf masked(vf value, vu keep) {
  return (vf)((vu)value & keep);
}

// What is kept of a row of K.
template <class T>
static inline void drop_row(const T* x, int64_t K, const RowMask& mask, T* out) {
  for (int64_t k = 0; k < K; k += VL) store_at(out, masked(load_at(x, k, K), mask.keep(k)), k, K);
}

// y += keep * x
template <class T>
static inline void add_kept(T* y, const float* x, int64_t K, const RowMask& mask) {
  for (int64_t k = 0; k < K; k += VL)
    store_at(y, load_at(y, k, K) + masked(load_at(x, k, K), mask.keep(k)), k, K);
}

}  // namespace COSERVE_ISA
}  // namespace coserve
