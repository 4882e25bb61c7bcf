// Argument checks of the operators.
#pragma once

#include <cmath>

// Not <ATen/ATen.h>, which takes four times as long to compile.
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

namespace mclfast::cpu {

inline void check_cpu(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.device().is_cpu(), name, " must be on the CPU, got ", x.device());
}

inline void check_floating(const at::Tensor& x, const char* name) {
  check_cpu(x, name);
  const auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kHalf ||
                  type == at::kBFloat16,
              name, " must be float16, bfloat16, float32 or float64, got ", type);
}

inline void check_positive(double value, const char* name) {
  TORCH_CHECK(std::isfinite(value) && value > 0, name, " must be finite and positive, got ", value);
}

// Statistics of half precision are float32.
inline at::ScalarType wide_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Contiguous, in `type`, of the given shape.
inline at::Tensor prepare(const at::Tensor& x, at::ScalarType type, at::IntArrayRef shape,
                          const char* name) {
  check_cpu(x, name);
  TORCH_CHECK(x.sizes() == shape, name, " must be ", shape, ", got ", x.sizes());
  return x.to(type).contiguous();
}

} // namespace mclfast::cpu
