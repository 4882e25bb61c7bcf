// IEEE half precision by arithmetic: the compiler need not have a type for it.
#pragma once
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float x = std::ldexp(static_cast<float>(fraction + (exponent ? 1024 : 0)),
                       std::max(exponent, 1) - 25);
  if (exponent == 31) x = fraction ? NAN : INFINITY;
  return h.bits & 0x8000 ? -x : x;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7fff};
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // of the last place
  const int count = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  // Counting up from zero runs through the subnormal and the normal numbers alike.
  return {static_cast<uint16_t>(sign | (unit == -24 ? count : ((unit + 24) << 10) + count))};
}
