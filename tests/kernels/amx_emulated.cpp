// csrc/linear.cpp compiled for AMX in software, behind two functions for ctypes.
#include "amx_emulation.h"
#define COSERVE_ISA amx_emulated
#include "linear.cpp"

namespace coserve {
void* scratch(int slot, size_t bytes) {
  static thread_local char* buffers[3];
  std::free(buffers[slot]);
  return buffers[slot] = (char*)std::aligned_alloc(64, (bytes + 63) / 64 * 64);
}
}  // namespace coserve

extern "C" void pack_weight(const void* w, int64_t stride, int64_t N, int64_t K, void* pack) {
  coserve::amx_emulated::pack_weight(1, w, stride, 0, N, K, pack);
}

extern "C" void linear(int64_t transposed, const void* a, int64_t a_stride, int64_t M, const void* pack, int64_t N,
                       int64_t K, const void* bias, void* out, int64_t out_stride) {
  coserve::amx_emulated::linear(1, transposed, a, a_stride, M, pack, N, K, bias, out, out_stride);
}

extern "C" bool tiles_are_released() {
  return !amx_emulation::tiles.configured;
}
