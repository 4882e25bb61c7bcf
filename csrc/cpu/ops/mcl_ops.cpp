// The CPU operators of namespace mclfast_cpu: argument checks, outputs, the call of the kernels.
// Registration under public names, with fakes and autograd, is done in Python.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "../dispatch/runtime.h"
#include "checks.h"
#include "plain.h"

namespace mclfast::cpu {
namespace {

using at::Tensor;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Samples grouped by class. The sort is stable, so members ascend inside a class.
struct ClassIndex {
  std::vector<int64_t> offsets{0}, members, positives;

  explicit ClassIndex(const Tensor& labels /* [B] */) {
    const Tensor y = labels.to(at::kLong).contiguous();
    const int64_t* label = y.const_data_ptr<int64_t>();
    const int64_t batch = y.numel();
    members.resize(batch);
    positives.resize(batch);
    std::iota(members.begin(), members.end(), 0);
    std::stable_sort(members.begin(), members.end(),
                     [&](int64_t i, int64_t j) { return label[i] < label[j]; });
    for (int64_t i = 1; i <= batch; ++i) {
      if (i < batch && label[members[i]] == label[members[i - 1]]) continue;
      for (int64_t k = offsets.back(); k < i; ++k) positives[members[k]] = i - offsets.back() - 1;
      offsets.push_back(i);
    }
  }
  Classes view() const {
    return {static_cast<int64_t>(offsets.size()) - 1, offsets.data(), members.data(),
            positives.data()};
  }
};

// One call of the mcl_rows family: checked arguments and the tensors that keep them alive.
class MclCall {
public:
  MclCall(const Tensor& nodes, const Tensor& labels, at::IntArrayRef networks, double temperature,
          double kl_temperature, int64_t families, int64_t row_start, int64_t row_count)
      : input_type_(nodes.scalar_type()), networks_(networks.vec()), temperature_(temperature),
        kl_temperature_(kl_temperature), families_(families), row_start_(row_start) {
    check_floating(nodes, "nodes");
    TORCH_CHECK(nodes.dim() == 3, "nodes must be [N, B, D], got ", nodes.sizes());
    N = nodes.size(0), B = nodes.size(1), D = nodes.size(2);
    TORCH_CHECK(N > 0 && B > 0 && D > 0, "nodes must not be empty, got ", nodes.sizes());
    check_cpu(labels, "labels");
    TORCH_CHECK(labels.dim() == 1 && labels.size(0) == B, "labels must be [B]=[", B, "], got ",
                labels.sizes());
    TORCH_CHECK(at::isIntegralType(labels.scalar_type(), /*includeBool=*/false),
                "labels must be integers, got ", labels.scalar_type());
    TORCH_CHECK(static_cast<int64_t>(networks_.size()) == N, "networks must name the network of "
                "each of the ", N, " nodes, got ", networks_.size(), " entries");
    check_positive(temperature, "temperature");
    check_positive(kl_temperature, "kl_temperature");
    TORCH_CHECK(families > 0 && families < 16, "families must be a bit mask in 1 .. 15, got ",
                families);
    TORCH_CHECK(row_start >= 0 && row_start <= B, "row_start must be in 0 .. ", B, ", got ",
                row_start);
    R = row_count;
    TORCH_CHECK(row_count >= 0 && row_count <= B - row_start, "row_count must be in 0 .. ",
                B - row_start, " for row_start ", row_start, ", got ", row_count);
    type = wide_type(nodes);
    nodes_ = nodes.to(type).contiguous();
    labels_ = labels;
    classes_ = std::make_unique<ClassIndex>(labels);
  }

  int64_t N, B, D, R;
  at::ScalarType type;

  // g_vcl [N, R]; g_soft_vcl, g_icl, g_soft_icl [N, N, R]
  void set_cotangents(const Tensor& vcl, const Tensor& soft_vcl, const Tensor& icl,
                      const Tensor& soft_icl) {
    g_[0] = prepare(vcl, type, {N, R}, "g_vcl");
    g_[1] = prepare(soft_vcl, type, {N, N, R}, "g_soft_vcl");
    g_[2] = prepare(icl, type, {N, N, R}, "g_icl");
    g_[3] = prepare(soft_icl, type, {N, N, R}, "g_soft_icl");
  }
  // lse, kl_lse [N, N, R]
  void set_statistics(const Tensor& lse, const Tensor& kl_lse) {
    lse_ = prepare(lse, type, {N, N, R}, "lse");
    kl_lse_ = prepare(kl_lse, type, {N, N, R}, "kl_lse");
  }
  void set_tangents(const Tensor& v_nodes /* [N, B, D] */) {
    tangents_ = prepare(v_nodes, type, {N, B, D}, "v_nodes");
  }

  void run(Mode mode) {
    const auto options = nodes_.options();
    if (mode != Mode::kBackward) {
      rows_[0] = at::zeros({N, R}, options);
      for (int k = 1; k < 4; ++k) rows_[k] = at::zeros({N, N, R}, options);
    }
    if (mode == Mode::kForward || mode == Mode::kFused) {
      lse_ = at::zeros({N, N, R}, options);
      kl_lse_ = at::zeros({N, N, R}, options);
    }
    if (mode != Mode::kForward) grad_ = at::empty({N, B, D}, options);
    // Below 1, kl_temperature enlarges the logits.
    const double hardest = temperature_ * std::min(kl_temperature_, 1.0);
    if (!kernels_apply(type, {nodes_}, hardest, {g_[0], g_[1], g_[2], g_[3]},
                       {tangents_}))
      run_plain(mode);
    else if (type == at::kDouble)
      kernels().mcl_rows_double(arguments<double>(), mode);
    else
      kernels().mcl_rows_float(arguments<float>(), mode);
  }

  const Tensor& row(int family) const { return rows_[family]; }
  const Tensor& lse() const { return lse_; }
  const Tensor& kl_lse() const { return kl_lse_; }
  Tensor grad() const { return grad_.to(input_type_); }
  // The gradient of a loss that has not met its cotangent yet, which may be a loss scale: half
  // precision would lose it.
  const Tensor& wide_grad() const { return grad_; }

private:
  void run_plain(Mode mode) {
    const PlainForm form =
        plain_mcl_rows(labels_, networks_, temperature_, kl_temperature_, row_start_, R);
    const Tensors wanted = of_families(g_, families_);
    if (mode == Mode::kForward || mode == Mode::kFused)
      set_rows(plain_values(form, {nodes_}));
    if (mode == Mode::kBackward || mode == Mode::kFused)
      grad_ = plain_gradient(form, {nodes_}, wanted)[0];
    if (mode == Mode::kDoubleBackward) {
      const Tensors found = plain_second(form, {nodes_}, wanted, {tangents_});
      grad_ = found[0];
      set_rows({found.begin() + 1, found.end()});
    }
  }
  void set_rows(const Tensors& found) {
    for (int k = 0; k < 4; ++k)
      if (families_ >> k & 1) rows_[k] = found[k];
  }

  template <class T> MclRows<T> arguments() const {
    const auto data = [](const Tensor& x) { return x.defined() ? x.data_ptr<T>() : nullptr; };
    MclRows<T> p;
    p.nodes_count = N, p.batch = B, p.width = D, p.row_start = row_start_, p.row_count = R;
    p.temperature = temperature_, p.kl_temperature = kl_temperature_;
    p.families = static_cast<unsigned>(families_);
    p.networks = networks_.data();
    p.classes = classes_->view();
    p.nodes = data(nodes_), p.tangents = data(tangents_);
    p.g_vcl = data(g_[0]), p.g_soft_vcl = data(g_[1]), p.g_icl = data(g_[2]);
    p.g_soft_icl = data(g_[3]);
    p.vcl = data(rows_[0]), p.soft_vcl = data(rows_[1]), p.icl = data(rows_[2]);
    p.soft_icl = data(rows_[3]);
    p.lse = data(lse_), p.kl_lse = data(kl_lse_);
    p.grad_nodes = data(grad_);
    return p;
  }

  at::ScalarType input_type_;
  std::vector<int64_t> networks_;
  double temperature_, kl_temperature_;
  int64_t families_, row_start_;
  std::unique_ptr<ClassIndex> classes_;
  Tensor nodes_, labels_, tangents_, g_[4], rows_[4], lse_, kl_lse_, grad_;
};

Tensors6 mcl_rows_forward(const Tensor& nodes, const Tensor& labels, at::IntArrayRef networks,
                          double temperature, double kl_temperature, int64_t families,
                          int64_t row_start, int64_t row_count) {
  MclCall call(nodes, labels, networks, temperature, kl_temperature, families, row_start,
               row_count);
  call.run(Mode::kForward);
  return {call.row(0), call.row(1), call.row(2), call.row(3), call.lse(), call.kl_lse()};
}

Tensor mcl_rows_backward(const Tensor& g_vcl, const Tensor& g_soft_vcl, const Tensor& g_icl,
                         const Tensor& g_soft_icl, const Tensor& nodes, const Tensor& labels,
                         at::IntArrayRef networks, const Tensor& lse, const Tensor& kl_lse,
                         double temperature, double kl_temperature, int64_t families,
                         int64_t row_start, int64_t row_count) {
  MclCall call(nodes, labels, networks, temperature, kl_temperature, families, row_start,
               row_count);
  call.set_cotangents(g_vcl, g_soft_vcl, g_icl, g_soft_icl);
  call.set_statistics(lse, kl_lse);
  call.run(Mode::kBackward);
  return call.grad();
}

Tensors7 mcl_rows_fused(const Tensor& g_vcl, const Tensor& g_soft_vcl, const Tensor& g_icl,
                        const Tensor& g_soft_icl, const Tensor& nodes, const Tensor& labels,
                        at::IntArrayRef networks, double temperature, double kl_temperature,
                        int64_t families) {
  MclCall call(nodes, labels, networks, temperature, kl_temperature, families, 0,
               nodes.dim() == 3 ? nodes.size(1) : 0);
  call.set_cotangents(g_vcl, g_soft_vcl, g_icl, g_soft_icl);
  call.run(Mode::kFused);
  return {call.row(0), call.row(1), call.row(2),   call.row(3),
          call.lse(),  call.kl_lse(), call.wide_grad()};
}

Tensors5 mcl_rows_double_backward(const Tensor& v_nodes, const Tensor& g_vcl,
                                  const Tensor& g_soft_vcl, const Tensor& g_icl,
                                  const Tensor& g_soft_icl, const Tensor& nodes,
                                  const Tensor& labels, at::IntArrayRef networks,
                                  const Tensor& lse, const Tensor& kl_lse, double temperature,
                                  double kl_temperature, int64_t families, int64_t row_start,
                                  int64_t row_count) {
  MclCall call(nodes, labels, networks, temperature, kl_temperature, families, row_start,
               row_count);
  call.set_tangents(v_nodes);
  call.set_cotangents(g_vcl, g_soft_vcl, g_icl, g_soft_icl);
  call.set_statistics(lse, kl_lse);
  call.run(Mode::kDoubleBackward);
  return {call.grad(), call.row(0), call.row(1), call.row(2), call.row(3)};
}

// One call of the info_nce family.
class InfoNceCall {
public:
  InfoNceCall(const Tensor& a, const Tensor& b, double temperature)
      : a_type_(a.scalar_type()), b_type_(b.scalar_type()), temperature_(temperature) {
    check_floating(a, "a");
    check_floating(b, "b");
    TORCH_CHECK(a.dim() == 2 && a.numel() > 0, "a must be [B, D] and not empty, got ", a.sizes());
    check_positive(temperature, "temperature");
    type = wide_type(a) == at::kDouble ? at::kDouble : wide_type(b);
    a_ = a.to(type).contiguous();
    b_ = prepare(b, type, a.sizes(), "b");
  }

  at::ScalarType type;

  void set_cotangents(const Tensor& row, const Tensor& col, const Tensor& diag /* [B] each */) {
    g_[0] = prepare(row, type, {batch()}, "g_row");
    g_[1] = prepare(col, type, {batch()}, "g_col");
    g_[2] = prepare(diag, type, {batch()}, "g_diag");
  }
  void set_statistics(const Tensor& row_lse, const Tensor& col_lse /* [B] each */) {
    lse_[0] = prepare(row_lse, type, {batch()}, "row_lse");
    lse_[1] = prepare(col_lse, type, {batch()}, "col_lse");
  }
  void set_tangents(const Tensor& v_a, const Tensor& v_b /* [B, D] each */) {
    tangent_[0] = prepare(v_a, type, a_.sizes(), "v_a");
    tangent_[1] = prepare(v_b, type, a_.sizes(), "v_b");
  }

  void run(Mode mode) {
    const auto options = a_.options();
    if (mode == Mode::kForward) {
      lse_[0] = at::empty({batch()}, options);
      lse_[1] = at::empty({batch()}, options);
    } else {
      grad_[0] = at::empty_like(a_);
      grad_[1] = at::empty_like(b_);
    }
    for (Tensor& row : rows_) row = at::empty({batch()}, options);
    if (!kernels_apply(type, {a_, b_}, temperature_, {g_[0], g_[1], g_[2]},
                       {tangent_[0], tangent_[1]}))
      run_plain(mode);
    else if (type == at::kDouble)
      kernels().info_nce_double(arguments<double>(), mode);
    else
      kernels().info_nce_float(arguments<float>(), mode);
  }

  const Tensor& lse(int side) const { return lse_[side]; }
  const Tensor& row(int which) const { return rows_[which]; }
  Tensor grad_a() const { return grad_[0].to(a_type_); }
  Tensor grad_b() const { return grad_[1].to(b_type_); }

private:
  int64_t batch() const { return a_.size(0); }

  void run_plain(Mode mode) {
    const PlainForm form = plain_info_nce(temperature_);
    const Tensors inputs{a_, b_}, cotangents{g_[0], g_[1], g_[2]};
    Tensors found;
    if (mode == Mode::kForward) {
      found = plain_values(form, inputs);
      lse_[0] = found[0], lse_[1] = found[1], rows_[2] = found[2].contiguous();
      return;
    }
    found = mode == Mode::kBackward
                ? plain_gradient(form, inputs, cotangents)
                : plain_second(form, inputs, cotangents, {tangent_[0], tangent_[1]});
    grad_[0] = found[0], grad_[1] = found[1];
    for (size_t k = 2; k < found.size(); ++k) rows_[k - 2] = found[k];
  }

  template <class T> InfoNce<T> arguments() const {
    const auto data = [](const Tensor& x) { return x.defined() ? x.data_ptr<T>() : nullptr; };
    InfoNce<T> p;
    p.batch = a_.size(0), p.width = a_.size(1), p.temperature = temperature_;
    p.a = data(a_), p.b = data(b_);
    p.tangent_a = data(tangent_[0]), p.tangent_b = data(tangent_[1]);
    p.g_row = data(g_[0]), p.g_col = data(g_[1]), p.g_diag = data(g_[2]);
    p.row_lse = data(lse_[0]), p.col_lse = data(lse_[1]);
    p.row = data(rows_[0]), p.col = data(rows_[1]), p.diag = data(rows_[2]);
    p.grad_a = data(grad_[0]), p.grad_b = data(grad_[1]);
    return p;
  }

  at::ScalarType a_type_, b_type_;
  double temperature_;
  Tensor a_, b_, tangent_[2], g_[3], lse_[2], rows_[3], grad_[2];
};

std::tuple<Tensor, Tensor, Tensor> info_nce_forward(const Tensor& a, const Tensor& b,
                                                    double temperature) {
  InfoNceCall call(a, b, temperature);
  call.run(Mode::kForward);
  return {call.lse(0), call.lse(1), call.row(2)};
}

std::tuple<Tensor, Tensor> info_nce_backward(const Tensor& g_row, const Tensor& g_col,
                                             const Tensor& g_diag, const Tensor& a,
                                             const Tensor& b, const Tensor& row_lse,
                                             const Tensor& col_lse, double temperature) {
  InfoNceCall call(a, b, temperature);
  call.set_cotangents(g_row, g_col, g_diag);
  call.set_statistics(row_lse, col_lse);
  call.run(Mode::kBackward);
  return {call.grad_a(), call.grad_b()};
}

Tensors5 info_nce_double_backward(const Tensor& v_a, const Tensor& v_b, const Tensor& g_row,
                                  const Tensor& g_col, const Tensor& g_diag, const Tensor& a,
                                  const Tensor& b, const Tensor& row_lse, const Tensor& col_lse,
                                  double temperature) {
  InfoNceCall call(a, b, temperature);
  call.set_tangents(v_a, v_b);
  call.set_cotangents(g_row, g_col, g_diag);
  call.set_statistics(row_lse, col_lse);
  call.run(Mode::kDoubleBackward);
  return {call.grad_a(), call.grad_b(), call.row(0), call.row(1), call.row(2)};
}

} // namespace

TORCH_LIBRARY(mclfast_cpu, m) {
  m.def("mcl_rows_forward(Tensor nodes, Tensor labels, int[] networks, float temperature, "
        "float kl_temperature, int families, int row_start, int row_count) -> "
        "(Tensor vcl, Tensor soft_vcl, Tensor icl, Tensor soft_icl, Tensor lse, Tensor kl_lse)");
  m.def("mcl_rows_backward(Tensor g_vcl, Tensor g_soft_vcl, Tensor g_icl, Tensor g_soft_icl, "
        "Tensor nodes, Tensor labels, int[] networks, Tensor lse, Tensor kl_lse, "
        "float temperature, float kl_temperature, int families, int row_start, int row_count) "
        "-> Tensor grad_nodes");
  m.def("mcl_rows_fused(Tensor g_vcl, Tensor g_soft_vcl, Tensor g_icl, Tensor g_soft_icl, "
        "Tensor nodes, Tensor labels, int[] networks, float temperature, float kl_temperature, "
        "int families) -> (Tensor vcl, Tensor soft_vcl, Tensor icl, Tensor soft_icl, "
        "Tensor lse, Tensor kl_lse, Tensor grad_nodes)");
  m.def("mcl_rows_double_backward(Tensor v_nodes, Tensor g_vcl, Tensor g_soft_vcl, "
        "Tensor g_icl, Tensor g_soft_icl, Tensor nodes, Tensor labels, int[] networks, "
        "Tensor lse, Tensor kl_lse, float temperature, float kl_temperature, int families, "
        "int row_start, int row_count) -> (Tensor h_nodes, Tensor h_vcl, Tensor h_soft_vcl, "
        "Tensor h_icl, Tensor h_soft_icl)");
  m.def("info_nce_forward(Tensor a, Tensor b, float temperature) -> "
        "(Tensor row_lse, Tensor col_lse, Tensor diagonal)");
  m.def("info_nce_backward(Tensor g_row, Tensor g_col, Tensor g_diag, Tensor a, Tensor b, "
        "Tensor row_lse, Tensor col_lse, float temperature) -> (Tensor grad_a, Tensor grad_b)");
  m.def("info_nce_double_backward(Tensor v_a, Tensor v_b, Tensor g_row, Tensor g_col, "
        "Tensor g_diag, Tensor a, Tensor b, Tensor row_lse, Tensor col_lse, float temperature) "
        "-> (Tensor h_a, Tensor h_b, Tensor h_row, Tensor h_col, Tensor h_diag)");
  m.def("capability() -> str", [] { return std::string(kernels().name); });
}

TORCH_LIBRARY_IMPL(mclfast_cpu, CPU, m) {
  m.impl("mcl_rows_forward", &mcl_rows_forward);
  m.impl("mcl_rows_backward", &mcl_rows_backward);
  m.impl("mcl_rows_fused", &mcl_rows_fused);
  m.impl("mcl_rows_double_backward", &mcl_rows_double_backward);
  m.impl("info_nce_forward", &info_nce_forward);
  m.impl("info_nce_backward", &info_nce_backward);
  m.impl("info_nce_double_backward", &info_nce_double_backward);
}

} // namespace mclfast::cpu
