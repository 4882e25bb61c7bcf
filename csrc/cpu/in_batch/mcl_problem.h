// Shared by the in-batch kernels: the arguments of one mcl_rows call in the form that the loops
// want.
#pragma once

#include <cstdint>

#include "../../families.h"
#include "../dispatch/kernels.h"
#include "../simd/capability.h"
#include "../simd/gemm.h"
#include "../simd/vec.h"
#include "../simd/workspace.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

template <class T> struct MclProblem : MclRows<T> {
  Mode mode;
  int64_t padded; // B rounded up to whole vectors
  int64_t stride; // of a row of logits: whole panels, and no power of two, for the cache's sake
  T inverse_temperature, inverse_kl, kl;
  bool forward, backward, second; // what the mode computes

  MclProblem(const MclRows<T>& arguments, Mode mode)
      : MclRows<T>(arguments), mode(mode), padded(round_up(arguments.batch, kLanes<T>)),
        stride(round_up(arguments.batch, kPanel<T>) + 64 / sizeof(T)),
        inverse_temperature(T(1 / arguments.temperature)),
        inverse_kl(T(1 / arguments.kl_temperature)), kl(T(arguments.kl_temperature)),
        forward(mode == Mode::kForward || mode == Mode::kFused),
        backward(mode == Mode::kBackward || mode == Mode::kFused),
        second(mode == Mode::kDoubleBackward) {}

  bool wants(unsigned family) const { return (this->families & family) != 0; }
  bool between(int64_t a, int64_t b) const { return this->networks[a] != this->networks[b]; }
  bool has_positive(int64_t sample) const { return this->classes.positives[sample] > 0; }
  // Start of the rows of an ordered pair in an [N, N, R] array.
  int64_t at(int64_t a, int64_t b) const {
    return (a * this->nodes_count + b) * this->row_count;
  }
  const T* node(int64_t n) const { return this->nodes + n * this->batch * this->width; }
  const T* tangent(int64_t n) const { return this->tangents + n * this->batch * this->width; }
  // Cotangent of a hard row: an anchor without a positive has a constant row.
  T hard_cotangent(const T* g, int64_t row) const {
    return has_positive(this->row_start + row) ? g[row] : T(0);
  }
};

// [count] unordered pairs of nodes of different networks.
struct NodePairs {
  struct Pair {
    int64_t a, b;
  };
  Buffer<Pair> pairs;
  int64_t count = 0;

  template <class T> explicit NodePairs(const MclProblem<T>& p) {
    if (!p.wants(kIcl | kSoftIcl)) return;
    pairs.resize(p.nodes_count * p.nodes_count);
    for (int64_t a = 0; a < p.nodes_count; ++a)
      for (int64_t b = a + 1; b < p.nodes_count; ++b)
        if (p.between(a, b)) pairs[count++] = {a, b};
  }
};

} // namespace mclfast::cpu::MCLFAST_CAPABILITY
