// Values of a memory bank: conversion of one row from and to the type of the computation. Half
// precision is converted by its bits, so that the loops vectorise on every instruction set.
#pragma once

#include <cstdint>

#include "../dispatch/kernels.h"
#include "../simd/capability.h"

namespace mclfast::cpu::MCLFAST_CAPABILITY {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

INLINE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
INLINE uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }
INLINE float widen(Half x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  // The exponent moves from bias 15 to bias 127 by a product, which is exact for subnormals too.
  const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
  // Infinity and NaN keep an exponent of all ones.
  const uint32_t special = magnitude | 0x7f800000u;
  return as_float((magnitude >= 0x0f800000u ? special : finite) | (x.bits & 0x8000u) << 16);
}

// To the nearest, ties to even.
INLINE void narrow(double x, double& to) { to = x; }
INLINE void narrow(double x, float& to) { to = float(x); }
INLINE void narrow(float x, BFloat16& to) {
  const uint32_t bits = as_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = uint16_t(nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
INLINE void narrow(float x, Half& to) {
  const uint32_t sign = as_bits(x) & 0x80000000u, bits = as_bits(x) ^ sign;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x47800000u) { // 2^16 and above
    half = 0x7c00u;
  } else if (bits < 0x38800000u) { // below 2^-14: a multiple of 2^-24, rounded by the sum
    half = as_bits(as_float(bits) + 0.5f) - 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
  }
  to.bits = uint16_t(sign >> 16 | half);
}

template <class T, class From> INLINE void widen_row(const From* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = T(widen(from[i]));
}

// Calls function(zero) with a value of the element's type.
template <class Function> INLINE void with_element_type(Element element, const Function& function) {
  switch (element) {
  case Element::kFloat: return function(float());
  case Element::kDouble: return function(double());
  case Element::kHalf: return function(Half());
  case Element::kBFloat16: return function(BFloat16());
  }
}

} // namespace mclfast::cpu::MCLFAST_CAPABILITY
