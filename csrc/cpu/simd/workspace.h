// Memory, work splitting and gradient accumulation.
#pragma once

#include <cstdint>

#include "../dispatch/kernels.h"
#include "capability.h"
#include "gemm.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

template <class T> class Buffer {
public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : data_(size > 0 ? static_cast<T*>(allocate(size * sizeof(T))) : nullptr) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { reset(nullptr); }
  void reset(T* data) {
    if (data_) release(data_);
    data_ = data;
  }
  void resize(int64_t size) { reset(static_cast<T*>(allocate(size * sizeof(T)))); }
  T* get() const { return data_; }
  operator T*() const { return data_; }

private:
  T* data_ = nullptr;
};

template <class T> void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

template <class Function> void run_parallel(int64_t workers, const Function& function) {
  run_workers(
      workers,
      [](void* context, int64_t worker) { (*static_cast<const Function*>(context))(worker); },
      const_cast<Function*>(&function));
}

// Static split of `count` equal items: worker w takes [begin(w), begin(w + 1)). The split depends
// on nothing but the number of workers, so results are equal from run to run.
struct EvenSplit {
  int64_t count, workers;
  EvenSplit(int64_t count) : count(count), workers(clamp(worker_count(), 1, max_of(count, 1))) {}
  int64_t begin(int64_t worker) const { return count * worker / workers; }
};

// Static split of two runs of items, the items of a run of equal cost.
struct WeightedSplit {
  int64_t first_count, second_count, workers;
  double first_cost, second_cost;

  WeightedSplit(int64_t first_count, double first_cost, int64_t second_count, double second_cost)
      : first_count(first_count), second_count(second_count),
        workers(clamp(worker_count(), 1, max_of(first_count + second_count, 1))),
        first_cost(first_cost), second_cost(second_cost) {}

  int64_t begin(int64_t worker) const {
    const double first = first_count * first_cost;
    const double target = (first + second_count * second_cost) * worker / workers;
    if (target <= first) return first_cost > 0 ? int64_t(target / first_cost + 0.5) : 0;
    return first_count + int64_t((target - first) / second_cost + 0.5);
  }
};

// Gradient of all nodes, one accumulator per worker and node, made at the first use: a worker sees
// only the nodes of its own pairs. Summed in the order of the workers.
template <class T> class Gradients {
public:
  Gradients(int64_t workers, int64_t nodes, int64_t size)
      : workers_(workers), nodes_(nodes), size_(size), slots_(workers * nodes) {
    for (int64_t i = 0; i < workers * nodes; ++i) slots_[i] = nullptr;
  }
  ~Gradients() {
    for (int64_t i = 0; i < workers_ * nodes_; ++i)
      if (slots_[i]) release(slots_[i]);
  }
  T* slot(int64_t worker, int64_t node) {
    T*& slot = slots_[worker * nodes_ + node];
    if (!slot) {
      slot = static_cast<T*>(allocate(size_ * sizeof(T)));
      fill(slot, size_, T(0));
    }
    return slot;
  }
  void sum_into(T* out) const { // [nodes, size]
    const EvenSplit split(nodes_);
    run_parallel(split.workers, [&](int64_t worker) {
      for (int64_t node = split.begin(worker); node < split.begin(worker + 1); ++node)
        sum_node_into(node, out + node * size_);
    });
  }
  void sum_node_into(int64_t node, T* out) const { // [size]
    fill(out, size_, T(0));
    for (int64_t w = 0; w < workers_; ++w)
      if (const T* from = slots_[w * nodes_ + node])
        for (int64_t i = 0; i < size_; ++i) out[i] += from[i];
  }

private:
  int64_t workers_, nodes_, size_;
  Buffer<T*> slots_;
};

// The [N, B, D] embeddings packed as right factors of both kinds of product.
template <class T> class Packed {
public:
  Packed(const T* nodes, int64_t count, int64_t batch, int64_t width, bool with_values)
      : batch_(batch), width_(width), contrast_(count * panels_size<T>(width, batch)),
        values_(with_values ? count * panels_size<T>(batch, width) : 0) {
    const EvenSplit split(count);
    run_parallel(split.workers, [&](int64_t worker) {
      for (int64_t n = split.begin(worker); n < split.begin(worker + 1); ++n) {
        const T* node = nodes + n * batch * width;
        pack_transposed(node, batch, width, contrast_.get() + n * panels_size<T>(width, batch));
        if (with_values)
          pack(node, batch, width, values_.get() + n * panels_size<T>(batch, width));
      }
    });
  }
  // E^T [D, B], the columns of a similarity matrix.
  Panels<T> contrast(int64_t node) const {
    return {contrast_.get() + node * panels_size<T>(width_, batch_), kPanel<T>, width_ * kPanel<T>};
  }
  // Rows first_row .. of E [B, D], what a logit gradient is multiplied with.
  Panels<T> values(int64_t node, int64_t first_row = 0) const {
    return {values_.get() + node * panels_size<T>(batch_, width_) + first_row * kPanel<T>,
            kPanel<T>, batch_ * kPanel<T>};
  }

private:
  int64_t batch_, width_;
  Buffer<T> contrast_, values_;
};

} // namespace mclfast::cpu::MCLFAST_CAPABILITY
