// y = x W^T + b in fp32, W packed once. A row's result is the same to the bit whatever the number of rows:
// each element is a chain of multiply-adds over K_BLOCK ascending k, and the blocks' sums are added in order.
#include "parallel.h"
#include "tile.h"

namespace coserve {
namespace COSERVE_ISA {

// The pack is common to all levels: panels of 48 columns (the last one narrower, a multiple of 16), each
// [K, width], zero-filled beyond N.
constexpr int64_t PANEL = 48, PANEL_STEP = 16, K_BLOCK = 256, ROW_BLOCK = 128;
constexpr int64_t MOST_PANELS = 8;  // of a task: their block of the pack and of x together fit into the L2 cache

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

// Rows [first, first + rows) of panels [from, to). A block of x serves all panels before the next one is read.
static void linear_block(const Linear& op, int64_t from, int64_t to, int64_t first, int64_t rows) {
  float edge[ROW_BLOCK * PANEL];  // the last panel's columns, where it is wider than y
  const float* x = op.x + first * op.x_stride;
  float* y = op.y + first * op.y_stride;
  for (int64_t k = 0; k < op.K; k += K_BLOCK)
    for (int64_t panel = from; panel < to; panel++) {
      int64_t width = panel_width(panel, op.N);
      bool inside = panel * PANEL + width <= op.N;
      matmul(rows, width,
             {smaller(K_BLOCK, op.K - k), x + k, op.x_stride, 1, op.pack + panel * PANEL * op.K + k * width,
              width, inside ? y + panel * PANEL : edge, inside ? op.y_stride : PANEL,
              k == 0 ? Into::SET : Into::ADD});
    }
  int64_t last = (to - 1) * PANEL, end = smaller(to * PANEL, op.N);
  if (last + panel_width(to - 1, op.N) > op.N)
    for (int64_t m = 0; m < rows; m++)
      for (int64_t n = last; n < op.N; n++) y[m * op.y_stride + n] = edge[m * PANEL + n - last];
  if (op.bias)
    for (int64_t m = 0; m < rows; m++)
      for (int64_t n = from * PANEL; n < end; n++) y[m * op.y_stride + n] += op.bias[n];
}

static void linear(const float* x, int64_t x_stride, int64_t M, const float* pack, int64_t N, int64_t K,
                   const float* bias, float* y, int64_t y_stride) {
  Linear op{x, x_stride, pack, N, K, bias, y, y_stride};
  int64_t panels = divide_up(N, PANEL), row_blocks = divide_up(M, ROW_BLOCK);
  int64_t share = panels * row_blocks / (4 * omp_get_max_threads());  // some tasks per thread for balance
  int64_t group = larger(1, smaller(share, M > TILE_ROWS ? MOST_PANELS : 1));
  parallel_for(divide_up(panels, group) * row_blocks, (double)M * N * K, [&](int64_t task) {
    int64_t first = task % row_blocks * ROW_BLOCK, from = task / row_blocks * group;
    linear_block(op, from, smaller(panels, from + group), first, smaller(ROW_BLOCK, M - first));
  });
}

void add_linear(Kernels& table) {
  table.pack = pack;
  table.linear = linear;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
