// Passes over the keys of a block of samples: tiles of bank rows are gathered into a small buffer,
// and every product with them is taken while they are in the cache.
//
// A block is one sample, or a few that share their negatives: those use every gathered tile.
// Bank rows are reads of a few hundred bytes at random addresses, so the rows of the next tile are
// prefetched between the products of the current one.
#pragma once

#include <cstdint>

#include "../dispatch/kernels.h"
#include "../simd/capability.h"
#include "../simd/gemm.h"
#include "../simd/vec.h"
#include "../simd/workspace.h"
#include "bank_elements.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

constexpr int64_t kKeyTile = 64;

// Nodes begin .. end - 1.
struct NodeRange {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Keys in columns column .. column + count - 1 of the samples first .. last - 1 of the block.
struct KeyTile {
  const int64_t* index;
  int64_t count, column, first, last;
  const int64_t* next; // of the tile after this one
  int64_t next_count;
};

// out[j * out_stride + i] = scale <key_i, vector_j>; rows of `length` (a multiple of kLanes)
// values, `stride` apart. As many sums as a vector has lanes are reduced together. Calls after(i)
// for every key.
template <class T, class After>
INLINE void key_products(const T* keys, int64_t count, const T* vectors, int64_t vectors_count,
                         int64_t length, int64_t stride, T scale, T* out, int64_t out_stride,
                         const After& after) {
  constexpr int W = kLanes<T>, kVectors = W >= 8 ? 4 : 2, kKeys = W / kVectors;
  for (int64_t i0 = 0; i0 < count; i0 += kKeys) {
    for (int64_t j0 = 0; j0 < vectors_count; j0 += kVectors) {
      // Rows past the end repeat the last one: their products are computed and dropped.
      const T *x[kKeys], *v[kVectors];
      UNROLL for (int i = 0; i < kKeys; ++i) x[i] = keys + min_of(i0 + i, count - 1) * stride;
      UNROLL for (int j = 0; j < kVectors; ++j)
        v[j] = vectors + min_of(j0 + j, vectors_count - 1) * stride;
      Vec<T> sums[W] = {};
      for (int64_t k = 0; k < length; k += W) {
        Vec<T> key[kKeys];
        UNROLL for (int i = 0; i < kKeys; ++i) key[i] = load(x[i] + k);
        UNROLL for (int j = 0; j < kVectors; ++j) {
          const Vec<T> y = load(v[j] + k);
          UNROLL for (int i = 0; i < kKeys; ++i) sums[j * kKeys + i] += key[i] * y;
        }
      }
      T lanes[W];
      store(lanes, scale * sums_of<T>(sums));
      const int64_t columns = min_of(count - i0, kKeys);
      const int64_t rows = min_of(vectors_count - j0, kVectors);
      for (int64_t j = 0; j < rows; ++j)
        for (int64_t i = 0; i < columns; ++i)
          out[(j0 + j) * out_stride + i0 + i] = lanes[j * kKeys + i];
    }
    for (int64_t i = i0; i < min_of(i0 + kKeys, count); ++i) after(i);
  }
}

// Blocks of samples over the workers. A block writes what belongs to its own samples only, so the
// result does not depend on the split.
struct BankBlocks {
  int64_t batch, height, count;

  // row_bytes: what a block keeps for each of its samples
  BankBlocks(const BankKeys& keys, int64_t batch, int64_t row_bytes) : batch(batch), height(1) {
    constexpr int64_t kBlockBytes = 4 << 20;
    if (keys.negatives_stride == 0)
      height = clamp(min_of(divide_up(batch, worker_count()), kBlockBytes / row_bytes), 1, 8);
    count = divide_up(batch, height);
  }
};

// Workspace of one worker.
template <class T> class BankSweep {
public:
  // The tangents are nullptr where there are none.
  BankSweep(const BankKeys& keys, int64_t nodes_count, int64_t batch, int64_t height,
            const T* nodes, const T* tangents)
      : stride(round_up(keys.width, kPanel<T>)), keys_(keys), nodes_count_(nodes_count),
        batch_(batch), nodes_(nodes), tangents_(tangents),
        tile_(keys.banks_count * kKeyTile * stride),
        vectors_((tangents ? 2 : 1) * height * nodes_count * stride),
        gradient_(height * nodes_count * stride), height_(height) {
    fill(tile_.get(), keys.banks_count * kKeyTile * stride, T(0));
    fill(vectors_.get(), (tangents ? 2 : 1) * height * nodes_count * stride, T(0));
  }

  const int64_t stride; // of a vector or key: whole panels, zeros at the end

  // Starts with the samples first .. first + count - 1.
  void start(int64_t first, int64_t count) {
    first_ = first, count_ = count;
    pack(nodes_, vectors_);
    if (tangents_) pack(tangents_, tangents());
    fill(gradient_.get(), height_ * nodes_count_ * stride, T(0));
  }

  // Calls body(tile) for all keys of the block. The second pass over the same keys goes backwards:
  // it begins with what the first one left in the cache.
  template <class Body> void for_each_tile(bool backwards, const Body& body) const {
    const int64_t K = keys_.negatives_count, P1 = keys_.positives_count;
    const int64_t* negatives = keys_.negatives + first_ * keys_.negatives_stride;
    const int64_t tiles = divide_up(K, kKeyTile), step = backwards ? -1 : 1;
    const auto size = [&](int64_t t) { return clamp(K - t * kKeyTile, 0, kKeyTile); };
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t* positives = keys_.positives + (first_ + i) * keys_.positives_stride;
      for (int64_t c = 0; c < P1; c += kKeyTile)
        body(KeyTile{positives + c, min_of(P1 - c, kKeyTile), c, i, i + 1, nullptr, 0});
    }
    for (int64_t t = backwards ? tiles - 1 : 0; t >= 0 && t < tiles; t += step) {
      const int64_t next = t + step;
      const bool more = next >= 0 && next < tiles;
      body(KeyTile{negatives + t * kKeyTile, size(t), P1 + t * kKeyTile, 0, count_,
                   more ? negatives + next * kKeyTile : nullptr, more ? size(next) : 0});
    }
  }

  // `ahead`: with prefetches of the next tile, where no products make them.
  void gather(const KeyTile& tile, int64_t bank, bool ahead) {
    ahead = ahead && tile.next;
    with_element_type(keys_.element, [&](auto zero) {
      const auto* rows =
          static_cast<const decltype(zero)*>(keys_.banks) + bank * keys_.samples * keys_.width;
      T* to = keys_of(bank);
      for (int64_t i = 0; i < tile.count; ++i) {
        widen_row(rows + tile.index[i] * keys_.width, to + i * stride, keys_.width);
        if (ahead && i < tile.next_count) prefetch(bank, tile.next[i]);
      }
    });
  }

  enum Vectors { kNodes, kTangents };

  // Scaled products of the gathered keys of a bank with some nodes of the sample i, or with their
  // tangents. `out` has a row for every node of the range. `ahead`: with prefetches of the next
  // tile.
  void products(const KeyTile& tile, int64_t bank, int64_t i, NodeRange range, Vectors of, T scale,
                T* out, int64_t out_stride, bool ahead) {
    const T* vectors = of == kNodes ? vectors_.get() : tangents();
    key_products(keys_of(bank), tile.count, vectors + (i * nodes_count_ + range.begin) * stride,
                 range.size(), round_up(keys_.width, kLanes<T>), stride, scale, out, out_stride,
                 [&](int64_t key) INLINE_LAMBDA {
                   if (ahead && tile.next && key < tile.next_count) prefetch(bank, tile.next[key]);
                 });
  }

  // Adds scale * weights [nodes of the range, kKeyTile] * keys to the gradient of the sample i.
  void accumulate(const KeyTile& tile, int64_t bank, int64_t i, NodeRange range, T scale,
                  const T* weights) {
    gemm<false>(range.size(), stride, tile.count, scale, weights, kKeyTile,
                unpacked(static_cast<const T*>(keys_of(bank)), stride),
                gradient_.get() + (i * nodes_count_ + range.begin) * stride, stride, true);
  }

  void write_gradient(T* grad_nodes /* [N, B, D] */) const {
    const int64_t D = keys_.width;
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t e = 0; e < nodes_count_; ++e)
        for (int64_t d = 0; d < D; ++d)
          grad_nodes[(e * batch_ + first_ + i) * D + d] =
              gradient_[(i * nodes_count_ + e) * stride + d];
  }

private:
  T* keys_of(int64_t bank) const { return tile_.get() + bank * kKeyTile * stride; }
  T* tangents() const { return vectors_.get() + height_ * nodes_count_ * stride; }

  void pack(const T* from, T* to) const {
    const int64_t D = keys_.width;
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t e = 0; e < nodes_count_; ++e)
        for (int64_t d = 0; d < D; ++d)
          to[(i * nodes_count_ + e) * stride + d] = from[(e * batch_ + first_ + i) * D + d];
  }

  INLINE void prefetch(int64_t bank, int64_t key) const {
    const int64_t size = element_size() * keys_.width;
    const char* row =
        static_cast<const char*>(keys_.banks) + (bank * keys_.samples + key) * size;
    for (int64_t offset = 0; offset < size; offset += 64)
      __builtin_prefetch(row + offset, /*write=*/0, /*locality=*/2);
  }
  int64_t element_size() const {
    switch (keys_.element) {
    case Element::kFloat: return 4;
    case Element::kDouble: return 8;
    default: return 2;
    }
  }

  const BankKeys& keys_;
  int64_t nodes_count_, batch_;
  const T *nodes_, *tangents_;
  Buffer<T> tile_;     // [M, kKeyTile, stride]
  Buffer<T> vectors_;  // [height, N, stride], then the tangents
  Buffer<T> gradient_; // [height, N, stride]
  int64_t height_, first_ = 0, count_ = 0;
};

} // namespace mclfast::cpu::MCLFAST_CAPABILITY
