// The table of one instruction set level.
#include "kernels.h"

namespace coserve {
namespace COSERVE_ISA {

void add_adamw_8bit(Kernels&);
void add_linear(Kernels&);
void add_attention(Kernels&);
void add_attention_backward(Kernels&);
void add_lora(Kernels&);
void add_elementwise(Kernels&);
void add_loss(Kernels&);
void add_optimizer(Kernels&);
void add_sampling(Kernels&);

#if defined(__AMX_BF16__)
static Kernels make() {  // AMX changes the linears alone
  Kernels table = avx512bf16::kernels();
  add_linear(table);
  return table;
}
#else
static Kernels make() {
  Kernels table{};
  add_adamw_8bit(table);
  add_linear(table);
  add_attention(table);
  add_attention_backward(table);
  add_lora(table);
  add_elementwise(table);
  add_loss(table);
  add_optimizer(table);
  add_sampling(table);
  return table;
}
#endif

const Kernels& kernels() {
  static const Kernels table = make();
  return table;
}

}  // namespace COSERVE_ISA
}  // namespace coserve
