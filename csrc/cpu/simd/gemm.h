// Small dense products on packed operands.
//
// An own product rather than BLAS: the matrices are small, one thread each, and every embedding is
// a factor of many products, so it is packed once per call instead of once per product; no BLAS has
// to be told to stay single threaded, and the result does not depend on which BLAS torch has.
#pragma once

#include <cstdint>

#include "capability.h"
#include "vec.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

// Rows and vectors of one register tile: accumulators, two vectors of B and one broadcast value fit
// the 32 registers of AVX-512 and NEON or the 16 of SSE and AVX2.
#if defined(__aarch64__) || MCLFAST_VECTOR_BYTES == 64
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 6;
#endif
template <class T> constexpr int kPanel = 2 * kLanes<T>;

// A [K, n] factor cut into panels of kPanel columns; rows `stride` apart inside a panel.
template <class T> struct Panels {
  const T* data;
  int64_t stride, panel_stride;
};

template <class T> Panels<T> unpacked(const T* data, int64_t row_stride) {
  return {data, row_stride, kPanel<T>};
}

template <class T> constexpr int64_t panels_size(int64_t rows, int64_t columns) {
  return rows * round_up(columns, kPanel<T>);
}

// Packs a row-major [K, n] matrix; zeros in the rest of the last panel.
template <class T> void pack(const T* from, int64_t K, int64_t n, T* to) {
  for (int64_t c0 = 0; c0 < n; c0 += kPanel<T>) {
    const int64_t columns = min_of(n - c0, int64_t(kPanel<T>));
    for (int64_t k = 0; k < K; ++k, to += kPanel<T>) {
      for (int64_t c = 0; c < columns; ++c) to[c] = from[k * n + c0 + c];
      for (int64_t c = columns; c < kPanel<T>; ++c) to[c] = T(0);
    }
  }
}

// Packs the transpose of a row-major [n, K] matrix.
template <class T> void pack_transposed(const T* from, int64_t n, int64_t K, T* to) {
  constexpr int W = kLanes<T>;
  for (int64_t c0 = 0; c0 < round_up(n, kPanel<T>); c0 += W) {
    T* panel = to + c0 / kPanel<T> * K * kPanel<T> + c0 % kPanel<T>;
    const int64_t columns = clamp(n - c0, 0, W), whole = columns == W ? K / W * W : 0;
    for (int64_t k = 0; k < whole; k += W)
      transpose_block(from + c0 * K + k, K, panel + k * kPanel<T>, int64_t(kPanel<T>));
    for (int64_t k = whole; k < K; ++k) {
      T* row = panel + k * kPanel<T>;
      for (int64_t c = 0; c < columns; ++c) row[c] = from[(c0 + c) * K + k];
      for (int64_t c = columns; c < W; ++c) row[c] = T(0);
    }
  }
}

// C[Rows, columns] (+)= alpha A[Rows, K] B[K, columns], columns <= kPanel. Not inlined: the loops
// around it would take registers from the accumulators.
template <class T, int Rows, bool TransA>
NOINLINE void gemm_tile(int64_t K, T alpha, const T* A, int64_t lda, const T* B, int64_t ldb, T* C,
                      int64_t ldc, int64_t columns, bool accumulate) {
  constexpr int W = kLanes<T>;
  Vec<T> left[Rows] = {}, right[Rows] = {};
  const T* a[Rows];
  UNROLL for (int i = 0; i < Rows; ++i) a[i] = A + i * lda;
  for (int64_t k = 0; k < K; ++k, A += lda, B += ldb) {
    const Vec<T> b0 = load(B), b1 = load(B + W);
    UNROLL for (int i = 0; i < Rows; ++i) {
      const Vec<T> x = broadcast(TransA ? A[i] : a[i][k]);
      left[i] += x * b0;
      right[i] += x * b1;
    }
  }
  if (columns == kPanel<T>) {
    UNROLL for (int i = 0; i < Rows; ++i) {
      T* c = C + i * ldc;
      store(c, accumulate ? load(c) + alpha * left[i] : alpha * left[i]);
      store(c + W, accumulate ? load(c + W) + alpha * right[i] : alpha * right[i]);
    }
    return;
  }
  T row[kPanel<T>];
  UNROLL for (int i = 0; i < Rows; ++i) {
    store(row, alpha * left[i]);
    store(row + W, alpha * right[i]);
    T* c = C + i * ldc;
    for (int64_t l = 0; l < columns; ++l) c[l] = accumulate ? c[l] + row[l] : row[l];
  }
}

// C[m, n] (+)= alpha op(A)[m, K] B[K, n]; op(A)(i, k) is A[k * lda + i] if TransA else
// A[i * lda + k]. A B that is not packed must be readable up to whole panels.
template <bool TransA, class T>
void gemm(int64_t m, int64_t n, int64_t K, T alpha, const T* A, int64_t lda, Panels<T> B, T* C,
          int64_t ldc, bool accumulate) {
  // A panel of this many rows stays in the first-level cache while all of A passes by it.
  constexpr int64_t kDepth = 32768 / (kPanel<T> * sizeof(T));
  const int64_t step = TransA ? 1 : lda;
  for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
    const int64_t depth = min_of(K - k0, kDepth);
    const T* a0 = TransA ? A + k0 * lda : A + k0;
    const bool add = accumulate || k0 > 0;
    for (int64_t c = 0; c < n; c += kPanel<T>) {
      const T* b = B.data + (c / kPanel<T>) * B.panel_stride + k0 * B.stride;
      const int64_t columns = min_of(n - c, int64_t(kPanel<T>));
      int64_t i = 0;
#define MCLFAST_TILE(ROWS)                                                                         \
  for (; i + ROWS <= m; i += ROWS)                                                                 \
    gemm_tile<T, ROWS, TransA>(depth, alpha, a0 + i * step, lda, b, B.stride, C + i * ldc + c,     \
                               ldc, columns, add);
      MCLFAST_TILE(kTileRows)
      MCLFAST_TILE(4)
      MCLFAST_TILE(2)
      MCLFAST_TILE(1)
#undef MCLFAST_TILE
    }
  }
}

// out[i * out_stride + j] = <A_i, B_j> for rows of `length` (a multiple of kLanes) values.
template <class T>
void gram(int64_t m, int64_t n, int64_t length, const T* A, int64_t lda, const T* B, int64_t ldb,
          T* out, int64_t out_stride) {
  constexpr int kBlock = 3;
  for (int64_t i0 = 0; i0 < m; i0 += kBlock) {
    for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
      // Rows past the end repeat the last one: their products are computed and dropped.
      const T *a[kBlock], *b[kBlock];
      for (int i = 0; i < kBlock; ++i) {
        a[i] = A + min_of(i0 + i, m - 1) * lda;
        b[i] = B + min_of(j0 + i, n - 1) * ldb;
      }
      Vec<T> sums[kBlock][kBlock] = {};
      for (int64_t k = 0; k < length; k += kLanes<T>) {
        UNROLL for (int i = 0; i < kBlock; ++i) {
          const Vec<T> x = load(a[i] + k);
          UNROLL for (int j = 0; j < kBlock; ++j) sums[i][j] += x * load(b[j] + k);
        }
      }
      for (int i = 0; i < kBlock && i0 + i < m; ++i)
        for (int j = 0; j < kBlock && j0 + j < n; ++j)
          out[(i0 + i) * out_stride + j0 + j] = sum_lanes<T>(sums[i][j]);
    }
  }
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY
