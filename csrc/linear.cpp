// y = x W^T + b in fp32, W packed once. A row's result is the same to the bit whatever the number of rows:
// each element is a chain of multiply-adds over K_BLOCK ascending k, and the blocks' sums are added in order.
#include "parallel.h"
#include "tile.h"

namespace coserve {
namespace COSERVE_ISA {

// The pack is common to all levels: panels of 48 columns (the last one narrower, a multiple of 16), each
// [K, width], zero-filled beyond N.
constexpr int64_t PANEL = 48, PANEL_STEP = 16, K_BLOCK = 256, ROW_BLOCK = 128;

static int64_t panel_width(int64_t panel, int64_t N) {
  return smaller(PANEL, round_up(N - panel * PANEL, PANEL_STEP));
}

static void pack(const float* w, int64_t n_stride, int64_t k_stride, int64_t N, int64_t K, float* out) {
  parallel_for(divide_up(N, PANEL), (double)N * K, [&](int64_t panel) {
    int64_t width = panel_width(panel, N), valid = smaller(width, N - panel * PANEL);
    const float* source = w + panel * PANEL * n_stride;
    float* target = out + panel * PANEL * K;
    for (int64_t k = 0; k < K; k++)
      for (int64_t n = 0; n < width; n++)
        target[k * width + n] = n < valid ? source[n * n_stride + k * k_stride] : 0.0f;
  });
}

struct Linear {
  const float* x;
  int64_t x_stride;
  const float* pack;
  int64_t N, K;
  const float* bias;
  float* y;
  int64_t y_stride;
};

// Rows [first, first + rows) of one panel's columns.
static void linear_panel(const Linear& op, int64_t panel, int64_t first, int64_t rows) {
  int64_t width = panel_width(panel, op.N), valid = smaller(width, op.N - panel * PANEL);
  float edge[ROW_BLOCK * PANEL];  // where the panel is wider than y
  float* y = op.y + first * op.y_stride + panel * PANEL;
  float* c = valid == width ? y : edge;
  int64_t ldc = valid == width ? op.y_stride : PANEL;
  const float* x = op.x + first * op.x_stride;
  for (int64_t k = 0; k < op.K; k += K_BLOCK)
    matmul(rows, width,
           {smaller(K_BLOCK, op.K - k), x + k, op.x_stride, 1, op.pack + panel * PANEL * op.K + k * width,
            width, c, ldc, k == 0 ? Into::SET : Into::ADD});
  if (c == edge)
    for (int64_t m = 0; m < rows; m++)
      for (int64_t n = 0; n < valid; n++) y[m * op.y_stride + n] = edge[m * PANEL + n];
  if (op.bias)
    for (int64_t m = 0; m < rows; m++)
      for (int64_t n = 0; n < valid; n++) y[m * op.y_stride + n] += op.bias[panel * PANEL + n];
}

static void linear(const float* x, int64_t x_stride, int64_t M, const float* pack, int64_t N, int64_t K,
                   const float* bias, float* y, int64_t y_stride) {
  Linear op{x, x_stride, pack, N, K, bias, y, y_stride};
  int64_t panels = divide_up(N, PANEL), row_blocks = divide_up(M, ROW_BLOCK);
  // Row blocks are inner so that a panel stays in the cache while they pass.
  parallel_for(panels * row_blocks, (double)M * N * K, [&](int64_t task) {
    int64_t first = task % row_blocks * ROW_BLOCK;
    linear_panel(op, task / row_blocks, first, smaller(ROW_BLOCK, M - first));
  });
}

void add_linear(Kernels& table) {
  table.pack = pack;
  table.linear = linear;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
