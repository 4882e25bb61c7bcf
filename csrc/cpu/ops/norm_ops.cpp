// Batch normalisation with a tangent, for the forward mode of the bilevel step.
#include <optional>
#include <tuple>

#include <ATen/ATen.h>
#include <torch/library.h>

#include "../dispatch/runtime.h"
#include "checks.h"

namespace mclfast::cpu {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// x as the kernels see it: [outer, channels, inner], inner = 1 where channels come last.
struct Layout {
  at::MemoryFormat format;
  int64_t outer, channels, inner;

  explicit Layout(const Tensor& x) {
    check_cpu(x, "x");
    TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble,
                "x must be float32 or float64, got ", x.scalar_type());
    TORCH_CHECK(x.dim() >= 2 && x.numel() > 0, "x must be [N, C, ...] and not empty, got ",
                x.sizes());
    format = x.suggest_memory_format();
    channels = x.size(1);
    const bool last = format != at::MemoryFormat::Contiguous;
    inner = last ? 1 : x.numel() / (x.size(0) * channels);
    outer = x.numel() / (channels * inner);
  }
};

// A tensor like x, in its layout.
Tensor like(const Tensor& value, const Tensor& x, const Layout& layout, const char* name) {
  check_cpu(value, name);
  TORCH_CHECK(value.sizes() == x.sizes() && value.scalar_type() == x.scalar_type(), name,
              " must be ", x.sizes(), " of ", x.scalar_type(), ", got ", value.sizes(), " of ",
              value.scalar_type());
  return value.contiguous(layout.format);
}

// A value for each channel.
Tensor per_channel(const Tensor& value, const Tensor& x, const char* name) {
  TORCH_CHECK(value.scalar_type() == x.scalar_type(), name, " must be of ", x.scalar_type(),
              ", got ", value.scalar_type());
  return prepare(value, x.scalar_type(), {x.size(1)}, name);
}
Tensor per_channel(const MaybeTensor& value, const Tensor& x, const char* name) {
  return value ? per_channel(*value, x, name) : Tensor();
}

template <class T> const T* data(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
dual_batch_norm(const Tensor& x, const Tensor& x_t, const MaybeTensor& weight,
                const MaybeTensor& weight_t, const MaybeTensor& bias, const MaybeTensor& bias_t,
                const MaybeTensor& running_mean, const MaybeTensor& running_var, double momentum,
                double eps) {
  const Layout layout(x);
  const Tensor x_ = x.contiguous(layout.format), x_t_ = like(x_t, x, layout, "x_t");
  const Tensor w = per_channel(weight, x, "weight"), w_t = per_channel(weight_t, x, "weight_t");
  const Tensor b = per_channel(bias, x, "bias"), b_t = per_channel(bias_t, x, "bias_t");
  const Tensor y = at::empty_like(x_), y_t = at::empty_like(x_);
  const Tensor statistics = at::empty({5, layout.channels}, x.options());
  const auto row = statistics.unbind();
  const auto run = [&](auto zero, auto* kernel) {
    using T = decltype(zero);
    DualNorm<T> p;
    p.outer = layout.outer, p.channels = layout.channels, p.inner = layout.inner, p.eps = eps;
    p.x = data<T>(x_), p.x_t = data<T>(x_t_);
    p.weight = data<T>(w), p.weight_t = data<T>(w_t), p.bias = data<T>(b), p.bias_t = data<T>(b_t);
    p.y = y.data_ptr<T>(), p.y_t = y_t.data_ptr<T>();
    p.mean = row[0].data_ptr<T>(), p.var = row[1].data_ptr<T>(), p.rstd = row[2].data_ptr<T>();
    p.mean_t = row[3].data_ptr<T>(), p.q = row[4].data_ptr<T>();
    kernel(p);
  };
  if (x.scalar_type() == at::kFloat) run(float(), kernels().dual_batch_norm_float);
  else run(double(), kernels().dual_batch_norm_double);
  if (running_mean) running_mean->mul_(1 - momentum).add_(row[0], momentum);
  if (running_var) {
    const double count = static_cast<double>(layout.outer * layout.inner);
    running_var->mul_(1 - momentum).add_(row[1], momentum * count / (count - 1));
  }
  return {y, y_t, row[0], row[2], row[3], row[4]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
dual_batch_norm_backward(const Tensor& g, const Tensor& g_t, const Tensor& x, const Tensor& x_t,
                         const MaybeTensor& weight, const MaybeTensor& weight_t, const Tensor& mean,
                         const Tensor& rstd, const Tensor& mean_t, const Tensor& q) {
  const Layout layout(x);
  const Tensor g_ = like(g, x, layout, "g"), g_t_ = like(g_t, x, layout, "g_t");
  const Tensor x_ = x.contiguous(layout.format), x_t_ = like(x_t, x, layout, "x_t");
  const Tensor w = per_channel(weight, x, "weight"), w_t = per_channel(weight_t, x, "weight_t");
  const Tensor mean_ = per_channel(mean, x, "mean"), rstd_ = per_channel(rstd, x, "rstd");
  const Tensor mean_t_ = per_channel(mean_t, x, "mean_t"), q_ = per_channel(q, x, "q");
  const Tensor g_x = at::empty_like(x_), g_x_t = at::empty_like(x_);
  const Tensor g_weight = at::empty_like(mean_), g_bias = at::empty_like(mean_);
  const auto run = [&](auto zero, auto* kernel) {
    using T = decltype(zero);
    DualNormGrad<T> p;
    p.outer = layout.outer, p.channels = layout.channels, p.inner = layout.inner;
    p.g = data<T>(g_), p.g_t = data<T>(g_t_), p.x = data<T>(x_), p.x_t = data<T>(x_t_);
    p.weight = data<T>(w), p.weight_t = data<T>(w_t);
    p.mean = data<T>(mean_), p.rstd = data<T>(rstd_);
    p.mean_t = data<T>(mean_t_), p.q = data<T>(q_);
    p.g_x = g_x.data_ptr<T>(), p.g_x_t = g_x_t.data_ptr<T>();
    p.g_weight = g_weight.data_ptr<T>(), p.g_bias = g_bias.data_ptr<T>();
    kernel(p);
  };
  if (x.scalar_type() == at::kFloat) run(float(), kernels().dual_batch_norm_backward_float);
  else run(double(), kernels().dual_batch_norm_backward_double);
  return {g_x, g_x_t, g_weight, g_bias};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(mclfast_cpu, m) {
  m.def("dual_batch_norm(Tensor x, Tensor x_t, Tensor? weight, Tensor? weight_t, Tensor? bias, "
        "Tensor? bias_t, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, "
        "float eps) -> (Tensor y, Tensor y_t, Tensor mean, Tensor rstd, Tensor mean_t, Tensor q)");
  m.def("dual_batch_norm_backward(Tensor g, Tensor g_t, Tensor x, Tensor x_t, Tensor? weight, "
        "Tensor? weight_t, Tensor mean, Tensor rstd, Tensor mean_t, Tensor q) -> "
        "(Tensor g_x, Tensor g_x_t, Tensor g_weight, Tensor g_bias)");
}

TORCH_LIBRARY_IMPL(mclfast_cpu, CPU, m) {
  m.impl("dual_batch_norm", &dual_batch_norm);
  m.impl("dual_batch_norm_backward", &dual_batch_norm_backward);
}

} // namespace mclfast::cpu
