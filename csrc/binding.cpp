// The Python module `coserve.kernels._native`: each kernel as a function of integers (data pointers, sizes,
// strides) and floats. Shapes and dtypes are checked by the callers in coserve/kernels/*.py.
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <tuple>
#include <type_traits>
#include <utility>

#ifdef COSERVE_X86
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace coserve {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

void* scratch(int slot, size_t bytes) {
  static thread_local Buffer buffers[3];
  Buffer& buffer = buffers[slot];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, buffer.size);
    if (!buffer.data) std::abort();
  }
  return buffer.data;
}

namespace {

const Kernels* (*const LEVELS[])() = {
    [] { return &plain::kernels(); },
#ifdef COSERVE_X86
    [] { return &avx2::kernels(); },
    [] { return &avx512::kernels(); },
    [] { return &avx512bf16::kernels(); },
    [] { return &amx::kernels(); },
#endif
};

#ifdef COSERVE_X86
// The CPU has AMX's bf16 tiles, and the kernel lets this process keep data in them (asked for once).
bool amx_is_granted() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return false;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}
#endif

int highest_level() {
#ifdef COSERVE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return !__builtin_cpu_supports("avx512bf16") ? 2 : amx_is_granted() ? 4 : 3;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

const int HIGHEST = highest_level();
int level = HIGHEST;
const Kernels* active = LEVELS[level]();

template <class T>
T from_python(PyObject* value) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(PyLong_AsVoidPtr(value));
  else if constexpr (std::is_floating_point_v<T>)
    return PyFloat_AsDouble(value);
  else
    return PyLong_AsLongLong(value);
}

template <auto Member>
struct Call;

template <class... Args, void (*Kernels::*Member)(Args...)>
struct Call<Member> {
  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != sizeof...(Args))
      return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", sizeof...(Args), count);
    return run(args, std::index_sequence_for<Args...>{});
  }
  template <size_t... I>
  static PyObject* run(PyObject* const* args, std::index_sequence<I...>) {
    std::tuple<Args...> values{from_python<Args>(args[I])...};
    if (PyErr_Occurred()) return nullptr;
    const Kernels* kernels = active;
    if (!(kernels->*Member))
      return PyErr_Format(PyExc_RuntimeError, "this kernel needs a higher instruction set level than %d", level);
    Py_BEGIN_ALLOW_THREADS;
    std::apply(kernels->*Member, values);
    Py_END_ALLOW_THREADS;
    return Py_NewRef(Py_None);
  }
};

PyObject* get_isa(PyObject*, PyObject*) {
  return PyLong_FromLong(level);
}

PyObject* max_isa(PyObject*, PyObject*) {
  return PyLong_FromLong(HIGHEST);
}

PyObject* set_isa(PyObject*, PyObject* value) {
  long wanted = PyLong_AsLong(value);
  if (PyErr_Occurred()) return nullptr;
  if (wanted < 0 || wanted > HIGHEST)
    return PyErr_Format(PyExc_ValueError, "instruction set level %ld is not supported by this CPU", wanted);
  level = static_cast<int>(wanted);
  active = LEVELS[level]();
  return Py_NewRef(Py_None);
}

template <auto Member>
PyMethodDef method(const char* name) {
  auto function = reinterpret_cast<void (*)()>(&Call<Member>::call);
  return {name, reinterpret_cast<PyCFunction>(function), METH_FASTCALL, nullptr};
}

PyMethodDef METHODS[] = {
    method<&Kernels::pack_weight>("pack_weight"),
    method<&Kernels::gather_rows>("gather_rows"),
    method<&Kernels::linear>("linear"),
    method<&Kernels::paged_attention>("paged_attention"),
    method<&Kernels::window_attention>("window_attention"),
    method<&Kernels::window_attention_backward>("window_attention_backward"),
    method<&Kernels::lora_forward>("lora_forward"),
    method<&Kernels::lora_backward>("lora_backward"),
    method<&Kernels::rms_norm>("rms_norm"),
    method<&Kernels::rms_norm_backward>("rms_norm_backward"),
    method<&Kernels::rope>("rope"),
    method<&Kernels::swiglu>("swiglu"),
    method<&Kernels::swiglu_backward>("swiglu_backward"),
    method<&Kernels::soft_cap>("soft_cap"),
    method<&Kernels::kv_store>("kv_store"),
    method<&Kernels::token_scores>("token_scores"),
    method<&Kernels::logit_gradient>("logit_gradient"),
    method<&Kernels::choose_tokens>("choose_tokens"),
    method<&Kernels::token_logprobs>("token_logprobs"),
    method<&Kernels::penalize>("penalize"),
    method<&Kernels::adamw>("adamw"),
    method<&Kernels::sgd>("sgd"),
    method<&Kernels::chunk_squares>("chunk_squares"),
    method<&Kernels::adamw_8bit>("adamw_8bit"),
    {"get_isa", get_isa, METH_NOARGS, "The level in use: 0 plain, 1 AVX2, 2 AVX-512, 3 AVX-512 with BF16, 4 AMX."},
    {"max_isa", max_isa, METH_NOARGS, "The highest level of this CPU."},
    {"set_isa", set_isa, METH_O, "Use another level."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_native", "C++ kernels on raw pointers.", -1, METHODS,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace coserve

PyMODINIT_FUNC PyInit__native() {
  return PyModule_Create(&coserve::MODULE);
}
