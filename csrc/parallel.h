// Loops over the one pool of OpenMP threads. A region uses all threads or one: libgomp ends the threads that
// a smaller team leaves idle, and starting them again costs more than the region.
#pragma once
#include <omp.h>

#include <cstdint>

#include "kernels.h"

namespace coserve {
namespace COSERVE_ISA {

static inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
static inline int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}
static inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
static inline int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// Multiply-adds (or as costly steps) below which one thread does all: some 20 us, against a few for a region on
// an idle machine and a scheduler's slice on a crowded one.
constexpr double SERIAL_WORK = 1e6;

template <class Body>
static inline void parallel_for(int64_t tasks, double work, const Body& body) {
  if (tasks < 2 || work < SERIAL_WORK || omp_get_max_threads() == 1 || omp_in_parallel()) {
    for (int64_t i = 0; i < tasks; i++) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < tasks; i++) body(i);
}

// The same over short rows, some of them a task.
template <class Body>
static inline void parallel_rows(int64_t rows, double work, const Body& body) {
  int64_t step = larger(1, smaller(16, rows / (4 * omp_get_max_threads())));
  parallel_for(divide_up(rows, step), work, [&](int64_t task) {
    for (int64_t t = task * step; t < smaller(rows, (task + 1) * step); t++) body(t);
  });
}

}  // namespace COSERVE_ISA
}  // namespace coserve
