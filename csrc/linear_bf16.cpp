// dx = dy W in bf16 with fp32 sums, W as it lies ([N, K], rows contiguous): blocks of it are interleaved on the
// fly, so the backward needs no second, transposed copy of the weights. A row's result does not depend on M.
#include "tile_bf16.h"

namespace coserve {
namespace COSERVE_ISA {

#if defined(__AVX512BF16__)

constexpr int64_t DEPTH = 256;         // rows of W of a block (two, if that is all there is)
constexpr int64_t MOST_ROWS = 512;     // of dy that share a block
constexpr int64_t BLOCK_BYTES = 512 << 10;  // of an interleaved block, at most: half of an L2 cache

struct InputGradient {
  const bf16* dy;
  int64_t dy_stride;
  const bf16* w;
  int64_t N, K, depth;
  bf16* dx;
  int64_t dx_stride;
};

struct Step {
  int64_t pairs;
  const bf16* dy;
  int64_t dy_stride;
  const bf16* panel;
  float* sums;  // [rows, PAIR_COLUMNS] at a stride, of the blocks before
  int64_t sums_stride;
  bool first, last;
  bf16* dx;
  int64_t dx_stride, columns;
};

template <int ROWS>
static inline void step_tile(const Step& s) {
  vf sum[ROWS][PAIR_VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < PAIR_VECTORS; v++) sum[r][v] = s.first ? vf{} : load(s.sums + r * s.sums_stride + v * VL);
  pair_tile<ROWS, PAIR_VECTORS>(s.pairs, s.dy, s.dy_stride, s.panel, PAIR_COLUMNS, sum);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < PAIR_VECTORS; v++) {
      if (!s.last)
        store(s.sums + r * s.sums_stride + v * VL, sum[r][v]);
      else if (v * VL < s.columns)
        store_at(s.dx + r * s.dx_stride, sum[r][v], v * VL, s.columns);
    }
}

static void step_rows(int64_t rows, const Step& s) {
  switch (rows) {
    case 1: return step_tile<1>(s);
    case 2: return step_tile<2>(s);
    case 3: return step_tile<3>(s);
    case 4: return step_tile<4>(s);
    case 5: return step_tile<5>(s);
    default: return step_tile<6>(s);
  }
}

static void fetch(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T1);
}

// Rows [first, first + rows) of the panels [from, to).
static void gradient_block(const InputGradient& op, int64_t from, int64_t to, int64_t first, int64_t rows) {
  int64_t panel_size = op.depth * PAIR_COLUMNS, width = (to - from) * PAIR_COLUMNS;
  bool whole = op.depth >= op.N;
  bf16* block = (bf16*)scratch(0, (to - from) * panel_size * sizeof(bf16) + (whole ? 0 : rows * width * sizeof(float)));
  float* sums = (float*)(block + (to - from) * panel_size);
  for (int64_t n = 0; n < op.N; n += op.depth) {
    int64_t depth = smaller(op.depth, op.N - n);
    interleave_rows([&](int64_t i) { return op.w + (n + i) * op.K; }, depth, from * PAIR_COLUMNS,
                    smaller(op.K, to * PAIR_COLUMNS), panel_size, block);
    // W streams from memory: while this block is multiplied, the next one's rows come nearer.
    int64_t ahead = n + op.depth, next_depth = smaller(op.depth, op.N - ahead), fetched = 0;
    int64_t line_bytes = (smaller(op.K, to * PAIR_COLUMNS) - from * PAIR_COLUMNS) * sizeof(bf16);
    for (int64_t m = 0; m < rows;) {
      int64_t left = divide_up(rows - m, PAIR_ROWS), height = divide_up(rows - m, left);
      for (int64_t panel = from; panel < to; panel++) {
        int64_t column = panel * PAIR_COLUMNS;
        step_rows(height, {depth / 2, op.dy + (first + m) * op.dy_stride + n, op.dy_stride,
                           block + (panel - from) * panel_size, sums + m * width + column - from * PAIR_COLUMNS, width,
                           n == 0, n + depth == op.N, op.dx + (first + m) * op.dx_stride + column, op.dx_stride,
                           op.K - column});
      }
      m += height;
      for (int64_t due = next_depth * m / rows; fetched < due; fetched++)
        fetch((const char*)(op.w + (ahead + fetched) * op.K + from * PAIR_COLUMNS), line_bytes);
    }
  }
}

static void linear_input_gradient(const void* dy, int64_t dy_stride, int64_t M, const void* w, int64_t N, int64_t K,
                                  void* dx, int64_t dx_stride) {
  InputGradient op{(const bf16*)dy, dy_stride, (const bf16*)w, N, K, N <= 2 * DEPTH ? N : DEPTH, (bf16*)dx, dx_stride};
  int64_t panels = divide_up(K, PAIR_COLUMNS), row_blocks = divide_up(M, MOST_ROWS), threads = omp_get_max_threads();
  int64_t most = larger(1, BLOCK_BYTES / (op.depth * PAIR_COLUMNS * (int64_t)sizeof(bf16)));
  int64_t groups = smaller(panels, round_up(divide_up(panels, most), threads));
  parallel_for(groups * row_blocks, (double)M * N * K, [&](int64_t task) {
    int64_t group = task / row_blocks, first = task % row_blocks * MOST_ROWS;
    gradient_block(op, panels * group / groups, panels * (group + 1) / groups, first, smaller(MOST_ROWS, M - first));
  });
}

void add_linear_bf16(Kernels& table) {
  table.linear_input_gradient = linear_input_gradient;
}

#else

void add_linear_bf16(Kernels&) {}

#endif

}  // namespace COSERVE_ISA
}  // namespace coserve
