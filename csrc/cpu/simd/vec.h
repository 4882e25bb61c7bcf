// Vectors of one instruction set, on the compiler's vector types, so that one source serves SSE,
// AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>

#include "capability.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

template <class T> struct Lanes;
template <> struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(MCLFAST_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(MCLFAST_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(MCLFAST_VECTOR_BYTES)));
};
template <> struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(MCLFAST_VECTOR_BYTES)));
  typedef double Unaligned
      __attribute__((vector_size(MCLFAST_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(MCLFAST_VECTOR_BYTES)));
};
template <class T> using Vec = typename Lanes<T>::Vec;
template <class T> constexpr int kLanes = MCLFAST_VECTOR_BYTES / sizeof(T);

template <class T> INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}
template <class T> INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = v;
}
template <class T> INLINE Vec<T> broadcast(T x) { return Vec<T>{} + x; }

template <int... Is> struct Indices {};
template <int Count, int... Is> struct MakeIndices : MakeIndices<Count - 1, Count - 1, Is...> {};
template <int... Is> struct MakeIndices<0, Is...> { typedef Indices<Is...> Type; };
template <class T> using LaneIndices = typename MakeIndices<kLanes<T>>::Type;

template <class T, int Distance> struct Butterfly {
  // Lane l gets lane l ^ Distance.
  template <int... Is> static INLINE Vec<T> swap(Vec<T> v, Indices<Is...>) {
    return __builtin_shufflevector(v, v, (Is ^ Distance)...);
  }
  // One step of a transposition: a and b, `Distance` rows apart, exchange off-diagonal blocks.
  template <int... Is> static INLINE void exchange(Vec<T>& a, Vec<T>& b, Indices<Is...>) {
    constexpr int W = kLanes<T>;
    const Vec<T> low =
        __builtin_shufflevector(a, b, ((Is & Distance) ? W + Is - Distance : Is)...);
    b = __builtin_shufflevector(a, b, ((Is & Distance) ? W + Is : Is + Distance)...);
    a = low;
  }
  static INLINE T sum(Vec<T> v) {
    return Butterfly<T, Distance / 2>::sum(v + swap(v, LaneIndices<T>()));
  }
  static INLINE T max(Vec<T> v) {
    const Vec<T> other = swap(v, LaneIndices<T>());
    return Butterfly<T, Distance / 2>::max(v > other ? v : other);
  }
  // Sums of 2 * Distance vectors, which are overwritten: lane l of the result for vector l, when
  // Distance is half the lanes.
  static INLINE Vec<T> sums(Vec<T>* v) {
    UNROLL for (int i = 0; i < Distance; ++i) {
      exchange(v[i], v[i + Distance], LaneIndices<T>());
      v[i] += v[i + Distance];
    }
    return Butterfly<T, Distance / 2>::sums(v);
  }
  static INLINE void transpose(Vec<T>* rows) {
    UNROLL for (int i = 0; i < kLanes<T>; ++i)
      if (!(i & Distance)) exchange(rows[i], rows[i + Distance], LaneIndices<T>());
    Butterfly<T, Distance / 2>::transpose(rows);
  }
};
template <class T> struct Butterfly<T, 0> {
  static INLINE T sum(Vec<T> v) { return v[0]; }
  static INLINE T max(Vec<T> v) { return v[0]; }
  static INLINE Vec<T> sums(Vec<T>* v) { return v[0]; }
  static INLINE void transpose(Vec<T>*) {}
};

template <class T> INLINE T sum_lanes(Vec<T> v) { return Butterfly<T, kLanes<T> / 2>::sum(v); }
template <class T> INLINE T max_lanes(Vec<T> v) { return Butterfly<T, kLanes<T> / 2>::max(v); }
// Lane l of the result is the sum of vectors[l]; overwrites the kLanes vectors.
template <class T> INLINE Vec<T> sums_of(Vec<T>* vectors) {
  return Butterfly<T, kLanes<T> / 2>::sums(vectors);
}
// Gives b where one of them is NaN.
template <class T> INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) { return a > b ? a : b; }

// to[i * to_stride + j] = from[j * from_stride + i] for a block of kLanes x kLanes.
template <class T>
INLINE void transpose_block(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  Vec<T> rows[kLanes<T>];
  UNROLL for (int i = 0; i < kLanes<T>; ++i) rows[i] = load(from + i * from_stride);
  Butterfly<T, kLanes<T> / 2>::transpose(rows);
  UNROLL for (int i = 0; i < kLanes<T>; ++i) store(to + i * to_stride, rows[i]);
}

// `v` with lane `lane` set to zero.
template <class T> INLINE Vec<T> without_lane(Vec<T> v, int lane) {
  T lanes[kLanes<T>];
  store(lanes, v);
  lanes[lane] = T(0);
  return load(lanes);
}

// Exponential to about one unit in the last place. Arguments below the smallest normal result give
// that result instead of 0 (a positive number below 1e-37, which no sum of this library can see);
// arguments above the range are not used. The NaN that arithmetic makes stays NaN.
INLINE Vec<float> exponential(Vec<float> x) {
  typedef Vec<float> V;
  typedef Lanes<float>::Bits Bits;
  x = maximum<float>(broadcast(-86.5f), x);
  // Adding 1.5 * 2^23 rounds to an integer n, left in the low bits.
  const V shifted = x * 1.44269504088896341f + 12582912.f;
  const V n = shifted - 12582912.f;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  return reinterpret_cast<V>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23));
}

INLINE Vec<double> exponential(Vec<double> x) {
  typedef Vec<double> V;
  typedef Lanes<double>::Bits Bits;
  x = maximum<double>(broadcast(-700.0), x);
  const V shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const V n = shifted - 6755399441055744.0;
  const V r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  // Taylor series: |r| <= log(2) / 2, so the first term left out is below 2^-57.
  V p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + (r + 1.0);
  return reinterpret_cast<V>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 52));
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY
