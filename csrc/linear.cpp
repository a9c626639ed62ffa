// The base products on the one packed copy of W (weight_pack.h): y = x W^T + b and, with the panels transposed on
// the fly, dx = dy W. Blocks of depth go in ascending order and depend on the depth alone, so a row's result is the
// same to the bit whatever the number of rows, the tile or the thread.
#include "linear_amx.h"
#include "linear_tile.h"

namespace coserve {
namespace COSERVE_ISA {

constexpr int64_t MOST_ROWS = 512;          // of A that share a block of B
// Of a block of B, at most: the next one, the sums and A share an L2 cache with it.
constexpr int64_t BLOCK_BYTES = 256 << 10;

// C [M, columns] = A [M, depth] B. Forward: B is W^T as it lies in the pack; transposed: B is W.
template <class T>
struct Product {
  bool transposed;
  const T* a;
  int64_t a_stride, M;
  const T* pack;
  int64_t N, K;
  const T* bias;
  T* out;
  int64_t out_stride;
  int64_t depth() const { return transposed ? N : K; }
  int64_t columns() const { return transposed ? K : N; }
};

static inline void widen_words(const bf16* in, int64_t words, float* out) {
  for (int64_t w = 0; w < words; w++)
    for (int64_t n = 0; n < PANEL; n++) {
      const bf16* pair = in + 2 * (w * PANEL + n);
      uint32_t bits[2] = {(uint32_t)pair[0].bits << 16, (uint32_t)pair[1].bits << 16};
      memcpy(out + 2 * w * PANEL + n, bits, 4);
      memcpy(out + (2 * w + 1) * PANEL + n, bits + 1, 4);
    }
}

// Panel `panel` of B, rows [d, d + depth), to `out`: [depth][16] in E, beyond the pack 0. `d` is a multiple of 16.
static inline void prepare(const Product<float>& op, int64_t panel, int64_t d, int64_t depth, float* out) {
  int64_t rows = smaller(PANEL, op.K - panel * PANEL);
  for (int64_t i = 0; i < depth; i += PANEL, out += PANEL * PANEL) {
    const float* in = op.pack + (d + i) / PANEL * panel_size<float>(op.K) + panel * PANEL * PANEL;
    float whole[PANEL * PANEL];
    if (rows < PANEL) {
      memset(whole, 0, sizeof whole);
      memcpy(whole, in, rows * PANEL * sizeof(float));
      in = whole;
    }
    transpose_words(in, out);
  }
}
static inline void prepare(const Product<bf16>& op, int64_t panel, int64_t d, int64_t depth, float* out) {
  if (!op.transposed) {
    const bf16* in = op.pack + panel * panel_size<bf16>(op.K) + d * PANEL;
    return widen_words(in, divide_up(depth, 2), out);
  }
  for (int64_t i = 0; i < depth; i += PANEL, out += PANEL * PANEL) {
    float wide[PANEL * PANEL];
    widen_words(op.pack + (d + i) / PANEL * panel_size<bf16>(op.K) + panel * PANEL * PANEL, PANEL / 2, wide);
    transpose_words(wide, out);
  }
}
static inline void prepare(const Product<bf16>& op, int64_t panel, int64_t d, int64_t depth, bf16* out) {
  int64_t pack_end = round_up(op.N, PANEL);
  for (int64_t i = 0; i < depth; i += PANEL, out += PANEL * PANEL) {
    if (d + i < pack_end)
      transpose_pairs(op.pack + (d + i) / PANEL * panel_size<bf16>(op.K) + panel * PANEL * PANEL, out);
    else
      memset(out, 0, PANEL * PANEL * sizeof(bf16));
  }
}

// n elements of a row of A in E, and zeros up to `padded`.
static inline void copy_row(const bf16* in, int64_t n, int64_t padded, bf16* out) {
  memcpy(out, in, n * sizeof(bf16));
  for (int64_t i = n; i < padded; i++) out[i].bits = 0;
}
template <class T>
static inline void copy_row(const T* in, int64_t n, int64_t padded, float* out) {
  for (int64_t i = 0; i < padded; i += VL) store_at(out, load_at(in, i, n), i, padded);
}

// Asks for the memory of the panels [from, to) of B, rows [d, d + depth), part `part` of `parts`.
template <class T>
static void fetch(const Product<T>& op, int64_t from, int64_t to, int64_t d, int64_t depth, int64_t part,
                  int64_t parts) {
  constexpr int64_t SIDE = PANEL * (int64_t)sizeof(T);
  const char* pack = (const char*)op.pack;
  int64_t size = panel_size<T>(op.K) * sizeof(T);
  int64_t runs = op.transposed ? divide_up(depth, PANEL) : to - from;
  int64_t bytes = op.transposed ? (smaller(to * PANEL, op.K) - from * PANEL) * SIDE : depth * SIDE;
  for (int64_t run = runs * part / parts; run < runs * (part + 1) / parts; run++) {
    const char* p = op.transposed ? pack + (d / PANEL + run) * size + from * PANEL * SIDE
                                  : pack + (from + run) * size + d * SIDE;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  }
}

// Rows [first, first + rows) of the panels [from, to) of C, in blocks of `most` rows of B.
template <class Tile, class T>
static void product_block(const Product<T>& op, int64_t from, int64_t to, int64_t first, int64_t rows, int64_t most) {
  typedef typename Tile::Element E;
  constexpr bool WIDENS = sizeof(E) != sizeof(T);
  const int64_t D = op.depth(), columns = op.columns(), width = (to - from) * PANEL;
  const bool in_place = !op.transposed && !WIDENS;
  const int64_t a_size = round_up(rows * round_up(most, Tile::STEP), 32), b_panel = round_up(most, 32) * PANEL;
  const int64_t sums_size = most < D ? rows * width : 0, block_size = in_place ? 0 : b_panel * (to - from);
  float* sums = (float*)scratch(0, sums_size * sizeof(float) + (a_size + block_size) * sizeof(E));
  E* a_copy = (E*)(sums + sums_size);
  E* block = a_copy + a_size;
  Tile tile;
  for (int64_t d = 0; d < D; d += most) {
    int64_t n = smaller(most, D - d), depth = round_up(n, Tile::STEP);
    const E *a = (const E*)(op.a + first * op.a_stride + d), *b = block;
    int64_t a_stride = op.a_stride, b_stride = b_panel;
    if (WIDENS || depth != n) {
      for (int64_t m = 0; m < rows; m++) copy_row(op.a + (first + m) * op.a_stride + d, n, depth, a_copy + m * depth);
      a = a_copy, a_stride = depth;
    }
    if constexpr (!WIDENS) {
      if (in_place) b = (const E*)op.pack + from * panel_size<T>(op.K) + d * PANEL, b_stride = panel_size<T>(op.K);
    }
    if (!in_place)
      for (int64_t p = from; p < to; p++) prepare(op, p, d, depth, block + (p - from) * b_panel);
    // W streams from memory: while this block is multiplied, the next one comes nearer.
    int64_t ahead = smaller(most, D - d - n), heights = divide_up(rows, Tile::ROWS), m = 0;
    for (int64_t i = 0; i < heights; i++) {
      int64_t height = divide_up(rows - m, heights - i);
      for (int64_t p = from; p < to; p += Tile::PANELS) {
        int64_t c = p * PANEL, row = first + m;
        tile.multiply(height, smaller(Tile::PANELS, to - p),
                       TileStep<E, T>{depth, a + m * a_stride, a_stride, b + (p - from) * b_stride, b_stride,
                                      sums + m * width + c - from * PANEL, width, d == 0, d + n == D,
                                      op.bias ? op.bias + c : nullptr, op.out + row * op.out_stride + c,
                                      op.out_stride, columns - c});
      }
      m += height;
      if (ahead && heights > 1) fetch(op, from, to, d + n, ahead, i, heights);
    }
  }
}

template <class Tile, class T>
static void product(const Product<T>& op) {
  typedef typename Tile::Element E;
  const int64_t D = op.depth(), panels = divide_up(op.columns(), PANEL), threads = omp_get_max_threads();
  const bool few = op.M <= Tile::ROWS && Tile::STEP > 1 && !op.transposed;
  const int64_t depth = Tile::DEPTH[op.transposed];
  const int64_t most = few ? larger(D, 1) : D <= Tile::UNCUT[op.transposed] ? larger(D, depth) : depth;
  const int64_t strips = divide_up(panels, Tile::PANELS), row_blocks = divide_up(op.M, MOST_ROWS);
  int64_t block = larger(1, BLOCK_BYTES / (most * PANEL * (int64_t)sizeof(E) * Tile::PANELS));  // strips
  if (op.M <= 2 * Tile::ROWS && !op.transposed) block = 1;
  int64_t groups = smaller(strips, round_up(divide_up(strips, block), threads));
  int64_t tasks = block > 1 ? groups : smaller(groups, 4 * threads);
  parallel_for(tasks * row_blocks, (double)op.M * op.N * op.K, [&](int64_t task) {
    int64_t part = task / row_blocks, first = task % row_blocks * MOST_ROWS;
    int64_t begin = groups * part / tasks, end = groups * (part + 1) / tasks;
    for (int64_t group = begin; group < end; group++) {
      int64_t from = strips * group / groups * Tile::PANELS, to = strips * (group + 1) / groups * Tile::PANELS;
      product_block<Tile>(op, from, smaller(to, panels), first, smaller(MOST_ROWS, op.M - first), most);
    }
  });
}

static void linear(int64_t dtype, int64_t transposed, const void* a, int64_t a_stride, int64_t M, const void* pack,
                   int64_t N, int64_t K, const void* bias, void* out, int64_t out_stride) {
  if (dtype == 0)
    return product<FloatTile>(Product<float>{transposed != 0, (const float*)a, a_stride, M, (const float*)pack, N, K,
                                             (const float*)bias, (float*)out, out_stride});
  Product<bf16> op{transposed != 0, (const bf16*)a, a_stride, M, (const bf16*)pack, N, K,
                   (const bf16*)bias, (bf16*)out, out_stride};
#if defined(__AMX_BF16__)
  product<AmxTile>(op);
#elif defined(__AVX512BF16__)
  if (transposed || M <= 6 || M > 12)
    product<PairTile<6, 4>>(op);
  else if (M <= 8)
    product<PairTile<8, 3>>(op);
  else
    product<PairTile<12, 2>>(op);
#else
  product<FloatTile>(op);
#endif
}

// Rows of W, `count` of them from row `first` on, into a pack whose memory was zero before its first row.
template <class T>
static void pack_rows(const T* w, int64_t stride, int64_t first, int64_t count, int64_t K, T* pack) {
  constexpr int64_t WORD = PackOf<T>::WORD;
  int64_t from = first / PANEL, words = K / WORD, size = panel_size<T>(K);
  parallel_for(divide_up(first + count, PANEL) - from, (double)count * K, [&](int64_t i) {
    int64_t panel = from + i, begin = larger(first, panel * PANEL), end = smaller(first + count, (panel + 1) * PANEL);
    T* out = pack + panel * size;
    const T* in = w + (begin - first) * stride;
    int64_t lane = begin - panel * PANEL, lanes = end - begin, word = 0;
    if (lanes == PANEL)
      for (; word + PANEL <= words; word += PANEL) {
        float square[PANEL * PANEL];
        for (int64_t n = 0; n < PANEL; n++) memcpy(square + n * PANEL, in + n * stride + word * WORD, PANEL * 4);
        transpose_words(square, (float*)(out + word * PANEL * WORD));
      }
    for (; word < words; word++)
      for (int64_t n = 0; n < lanes; n++)
        memcpy(out + (word * PANEL + lane + n) * WORD, in + n * stride + word * WORD, 4);
    if (words * WORD < K)
      for (int64_t n = 0; n < lanes; n++) out[(words * PANEL + lane + n) * WORD] = in[n * stride + words * WORD];
  });
}

static void pack_weight(int64_t dtype, const void* w, int64_t stride, int64_t first, int64_t count, int64_t K,
                        void* pack) {
  if (dtype == 0) return pack_rows((const float*)w, stride, first, count, K, (float*)pack);
  pack_rows((const bf16*)w, stride, first, count, K, (bf16*)pack);
}

template <class T>
static void gather(const T* pack, int64_t K, const int64_t* rows, int64_t count, T* out) {
  constexpr int64_t WORD = PackOf<T>::WORD;
  parallel_for(count, 16.0 * count * K, [&](int64_t i) {  // a row's words lie a line apart
    const T* in = pack + rows[i] / PANEL * panel_size<T>(K) + rows[i] % PANEL * WORD;
    T* row = out + i * K;
    int64_t word = 0;
    for (; word < K / WORD; word++) memcpy(row + word * WORD, in + word * PANEL * WORD, 4);
    if (word * WORD < K) row[word * WORD] = in[word * PANEL * WORD];
  });
}

static void gather_rows(int64_t dtype, const void* pack, int64_t K, const int64_t* rows, int64_t count, void* out) {
  if (dtype == 0) return gather((const float*)pack, K, rows, count, (float*)out);
  gather((const bf16*)pack, K, rows, count, (bf16*)out);
}

void add_linear(Kernels& table) {
  table.pack_weight = pack_weight;
  table.gather_rows = gather_rows;
  table.linear = linear;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
