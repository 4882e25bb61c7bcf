// The memory-bank operators of namespace mclfast_cpu: argument checks, outputs, the call of the
// kernels. Banks are used in place, whatever their size and type.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <torch/library.h>

#include "../../bank_schemas.h"
#include "../dispatch/runtime.h"
#include "checks.h"
#include "plain.h"

namespace mclfast::cpu {
namespace {

using at::Tensor;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
  case at::kDouble: return Element::kDouble;
  case at::kHalf: return Element::kHalf;
  case at::kBFloat16: return Element::kBFloat16;
  default: return Element::kFloat;
  }
}

void check_banks(const Tensor& banks) {
  check_floating(banks, "banks");
  TORCH_CHECK(banks.dim() == 3, "banks must be [M, n, D], got ", banks.sizes());
  TORCH_CHECK(banks.numel() > 0, "banks must not be empty, got ", banks.sizes());
  TORCH_CHECK(banks.is_contiguous(), "banks must be contiguous, got strides ", banks.strides());
}

void check_range(const int64_t* index, int64_t count, int64_t samples, const char* name) {
  int64_t low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, index[i]);
    high = std::max(high, index[i]);
  }
  TORCH_CHECK(low >= 0 && high < samples, name, " must be in 0 .. ", samples - 1, ", got ",
              low < 0 ? low : high);
}

// [rows, columns] of int64 in 0 .. samples - 1, any row stride.
void check_keys(const Tensor& index, int64_t rows, int64_t samples, const char* name) {
  check_cpu(index, name);
  TORCH_CHECK(index.scalar_type() == at::kLong, name, " must be int64, got ",
              index.scalar_type());
  TORCH_CHECK(index.dim() == 2 && index.size(0) == rows && index.size(1) > 0, name,
              " must be [B, columns] with B=", rows, " and at least one column, got ",
              index.sizes());
  TORCH_CHECK(index.size(1) == 1 || index.stride(1) == 1, name,
              " must have a contiguous last dimension, got strides ", index.strides());
  const int64_t* data = index.const_data_ptr<int64_t>();
  const int64_t different = index.stride(0) == 0 ? 1 : rows;
  for (int64_t r = 0; r < different; ++r)
    check_range(data + r * index.stride(0), index.size(1), samples, name);
}

// Embeddings, banks and keys of one call, checked.
class BankCall {
public:
  BankCall(const Tensor& nodes, const Tensor& banks, const Tensor& pos_idx, const Tensor& neg_idx,
           double temperature)
      : input_type_(nodes.scalar_type()), banks_(banks), pos_idx_(pos_idx), neg_idx_(neg_idx),
        temperature_(temperature) {
    check_floating(nodes, "nodes");
    TORCH_CHECK(nodes.dim() == 3, "nodes must be [N, B, D], got ", nodes.sizes());
    TORCH_CHECK(nodes.numel() > 0, "nodes must not be empty, got ", nodes.sizes());
    N = nodes.size(0), B = nodes.size(1), D = nodes.size(2);
    check_banks(banks);
    M = banks.size(0), n = banks.size(1);
    TORCH_CHECK(banks.size(2) == D, "banks must have the ", D, " features of nodes, got ",
                banks.size(2));
    check_keys(pos_idx, B, n, "pos_idx");
    check_keys(neg_idx, B, n, "neg_idx");
    check_positive(temperature, "temperature");
    type = wide_type(nodes);
    nodes_ = nodes.to(type).contiguous();
  }

  void set_tangents(const Tensor& v_nodes /* [N, B, D] */) {
    tangents_ = prepare(v_nodes, type, {N, B, D}, "v_nodes");
  }

  int64_t N, B, D, M, n;
  at::ScalarType type;

protected:
  BankKeys keys() const {
    return {banks_.const_data_ptr(),
            element_of(banks_),
            M,
            n,
            D,
            pos_idx_.const_data_ptr<int64_t>(),
            pos_idx_.size(1),
            pos_idx_.stride(0),
            neg_idx_.const_data_ptr<int64_t>(),
            neg_idx_.size(1),
            neg_idx_.stride(0)};
  }
  template <class T> static T* data(const Tensor& x) {
    return x.defined() ? x.data_ptr<T>() : nullptr;
  }
  Tensor zeros(at::IntArrayRef shape) const { return at::zeros(shape, nodes_.options()); }

  // Results of `body(first, count)` for some samples at a time, joined along their dimensions of
  // the samples: the plain form gathers the keys of all its samples.
  template <class Body>
  Tensors by_samples(const std::vector<int64_t>& dims, const Body& body) const {
    constexpr int64_t kValues = int64_t(1) << 22;
    const int64_t each = (pos_idx_.size(1) + neg_idx_.size(1)) * D;
    const int64_t height = std::max<int64_t>(kValues / each, 1);
    std::vector<Tensors> parts(dims.size());
    for (int64_t first = 0; first < B; first += height) {
      const Tensors found = body(first, std::min(height, B - first));
      for (size_t i = 0; i < dims.size(); ++i) parts[i].push_back(found[i]);
    }
    Tensors whole;
    for (size_t i = 0; i < dims.size(); ++i)
      whole.push_back(parts[i][0].defined() ? at::cat(parts[i], dims[i]) : Tensor());
    return whole;
  }

  at::ScalarType input_type_;
  Tensor banks_, pos_idx_, neg_idx_, nodes_, tangents_;
  double temperature_;
};

// One call of the bank_mcl family.
class BankMclCall : public BankCall {
public:
  BankMclCall(const Tensor& nodes, const Tensor& banks, const Tensor& pos_idx,
              const Tensor& neg_idx, at::IntArrayRef networks, double temperature,
              double kl_temperature, int64_t families)
      : BankCall(nodes, banks, pos_idx, neg_idx, temperature), networks_(networks.vec()),
        kl_temperature_(kl_temperature), families_(families) {
    TORCH_CHECK(static_cast<int64_t>(networks_.size()) == N, "networks must name the network of "
                "each of the ", N, " nodes, got ", networks_.size(), " entries");
    for (const int64_t network : networks_)
      TORCH_CHECK(network >= 0 && network < M, "networks must be in 0 .. ", M - 1,
                  ", the banks, got ", network);
    TORCH_CHECK(std::is_sorted(networks_.begin(), networks_.end()),
                "networks must be in ascending order, got ", networks);
    check_positive(kl_temperature, "kl_temperature");
    TORCH_CHECK(families > 0 && families < 16, "families must be a bit mask in 1 .. 15, got ",
                families);
    for (int64_t m = 0; m <= M; ++m)
      offsets_.push_back(std::lower_bound(networks_.begin(), networks_.end(), m) -
                         networks_.begin());
  }

  // g_vcl [N, B]; g_soft_vcl, g_soft_icl [N, N, B]; g_icl [M, N, B]
  void set_cotangents(const Tensor& vcl, const Tensor& soft_vcl, const Tensor& icl,
                      const Tensor& soft_icl) {
    g_[0] = prepare(vcl, type, {N, B}, "g_vcl");
    g_[1] = prepare(soft_vcl, type, {N, N, B}, "g_soft_vcl");
    g_[2] = prepare(icl, type, {M, N, B}, "g_icl");
    g_[3] = prepare(soft_icl, type, {N, N, B}, "g_soft_icl");
  }
  // lse, kl_lse [M, N, B]
  void set_statistics(const Tensor& lse, const Tensor& kl_lse) {
    lse_ = prepare(lse, type, {M, N, B}, "lse");
    kl_lse_ = prepare(kl_lse, type, {M, N, B}, "kl_lse");
  }

  void run(Mode mode) {
    if (mode != Mode::kBackward) {
      rows_[0] = zeros({N, B});
      rows_[1] = zeros({N, N, B});
      rows_[2] = zeros({M, N, B});
      rows_[3] = zeros({N, N, B});
    }
    if (mode == Mode::kForward || mode == Mode::kFused) {
      lse_ = zeros({M, N, B});
      kl_lse_ = zeros({M, N, B});
    }
    if (mode != Mode::kForward) grad_ = at::empty({N, B, D}, nodes_.options());
    if (type == at::kDouble)
      kernels().bank_rows_double(arguments<double>(), mode);
    else
      kernels().bank_rows_float(arguments<float>(), mode);
    // The kernels read the banks once and leave the check to their statistics, which are not finite
    // where a logit was not. Statistics stay as they are: the next call looks at them too.
    if (!all_finite({lse_, kl_lse_, rows_[0], rows_[1], rows_[2], rows_[3], grad_, tangents_, g_[0],
                     g_[1], g_[2], g_[3]}))
      run_plain(mode);
  }

  const Tensor& row(int family) const { return rows_[family]; }
  const Tensor& lse() const { return lse_; }
  const Tensor& kl_lse() const { return kl_lse_; }
  Tensor grad() const { return grad_.to(input_type_); }
  const Tensor& wide_grad() const { return grad_; }

private:
  void run_plain(Mode mode) {
    std::vector<int64_t> dims; // of the gradient and of the rows
    if (mode != Mode::kForward) dims.push_back(1);
    if (mode != Mode::kBackward) dims.insert(dims.end(), 4, -1);
    const Tensors found = by_samples(dims, [&](int64_t first, int64_t count) {
      const PlainForm form =
          plain_bank_mcl(banks_, pos_idx_.narrow(0, first, count),
                         neg_idx_.narrow(0, first, count), networks_, temperature_,
                         kl_temperature_);
      const Tensors nodes{nodes_.narrow(1, first, count)};
      Tensors wanted = of_families(g_, families_);
      for (Tensor& g : wanted)
        if (g.defined()) g = g.narrow(-1, first, count);
      if (mode == Mode::kForward) return plain_values(form, nodes);
      if (mode == Mode::kDoubleBackward)
        return plain_second(form, nodes, wanted, {tangents_.narrow(1, first, count)});
      Tensors made = plain_gradient(form, nodes, wanted);
      if (mode == Mode::kFused)
        for (const Tensor& row : plain_values(form, nodes)) made.push_back(row);
      return made;
    });
    size_t next = 0;
    if (mode != Mode::kForward) grad_ = found[next++];
    for (int k = 0; k < 4 && mode != Mode::kBackward; ++k)
      if (families_ >> k & 1) rows_[k] = found[next + k];
  }

  template <class T> BankRows<T> arguments() const {
    BankRows<T> p;
    p.keys = keys();
    p.nodes_count = N, p.batch = B;
    p.temperature = temperature_, p.kl_temperature = kl_temperature_;
    p.families = static_cast<unsigned>(families_);
    p.networks = networks_.data(), p.offsets = offsets_.data();
    p.nodes = data<T>(nodes_), p.tangents = data<T>(tangents_);
    p.g_vcl = data<T>(g_[0]), p.g_soft_vcl = data<T>(g_[1]), p.g_icl = data<T>(g_[2]);
    p.g_soft_icl = data<T>(g_[3]);
    p.vcl = data<T>(rows_[0]), p.soft_vcl = data<T>(rows_[1]), p.icl = data<T>(rows_[2]);
    p.soft_icl = data<T>(rows_[3]);
    p.lse = data<T>(lse_), p.kl_lse = data<T>(kl_lse_);
    p.grad_nodes = data<T>(grad_);
    return p;
  }

  std::vector<int64_t> networks_, offsets_;
  double kl_temperature_;
  int64_t families_;
  Tensor g_[4], rows_[4], lse_, kl_lse_, grad_;
};

Tensors6 bank_mcl_forward(const Tensor& nodes, const Tensor& banks, const Tensor& pos_idx,
                          const Tensor& neg_idx, at::IntArrayRef networks, double temperature,
                          double kl_temperature, int64_t families) {
  BankMclCall call(nodes, banks, pos_idx, neg_idx, networks, temperature, kl_temperature,
                   families);
  call.run(Mode::kForward);
  return {call.row(0), call.row(1), call.row(2), call.row(3), call.lse(), call.kl_lse()};
}

Tensor bank_mcl_backward(const Tensor& g_vcl, const Tensor& g_soft_vcl, const Tensor& g_icl,
                         const Tensor& g_soft_icl, const Tensor& nodes, const Tensor& banks,
                         const Tensor& pos_idx, const Tensor& neg_idx, at::IntArrayRef networks,
                         const Tensor& lse, const Tensor& kl_lse, double temperature,
                         double kl_temperature, int64_t families) {
  BankMclCall call(nodes, banks, pos_idx, neg_idx, networks, temperature, kl_temperature,
                   families);
  call.set_cotangents(g_vcl, g_soft_vcl, g_icl, g_soft_icl);
  call.set_statistics(lse, kl_lse);
  call.run(Mode::kBackward);
  return call.grad();
}

Tensors7 bank_mcl_fused(const Tensor& g_vcl, const Tensor& g_soft_vcl, const Tensor& g_icl,
                        const Tensor& g_soft_icl, const Tensor& nodes, const Tensor& banks,
                        const Tensor& pos_idx, const Tensor& neg_idx, at::IntArrayRef networks,
                        double temperature, double kl_temperature, int64_t families) {
  BankMclCall call(nodes, banks, pos_idx, neg_idx, networks, temperature, kl_temperature,
                   families);
  call.set_cotangents(g_vcl, g_soft_vcl, g_icl, g_soft_icl);
  call.run(Mode::kFused);
  return {call.row(0), call.row(1), call.row(2),   call.row(3),
          call.lse(),  call.kl_lse(), call.wide_grad()};
}

Tensors5 bank_mcl_double_backward(const Tensor& v_nodes, const Tensor& g_vcl,
                                  const Tensor& g_soft_vcl, const Tensor& g_icl,
                                  const Tensor& g_soft_icl, const Tensor& nodes,
                                  const Tensor& banks, const Tensor& pos_idx,
                                  const Tensor& neg_idx, at::IntArrayRef networks,
                                  const Tensor& lse, const Tensor& kl_lse, double temperature,
                                  double kl_temperature, int64_t families) {
  BankMclCall call(nodes, banks, pos_idx, neg_idx, networks, temperature, kl_temperature,
                   families);
  call.set_tangents(v_nodes);
  call.set_cotangents(g_vcl, g_soft_vcl, g_icl, g_soft_icl);
  call.set_statistics(lse, kl_lse);
  call.run(Mode::kDoubleBackward);
  return {call.grad(), call.row(0), call.row(1), call.row(2), call.row(3)};
}

// One call of the bank_nce family.
class BankNceCall : public BankCall {
public:
  BankNceCall(const Tensor& nodes, const Tensor& banks, const Tensor& pos_idx,
              const Tensor& neg_idx, double temperature)
      : BankCall(nodes, banks, pos_idx, neg_idx, temperature) {
    TORCH_CHECK(N == M, "nodes must be one for each of the ", M, " banks, got ", N);
    TORCH_CHECK(pos_idx.size(1) == 1, "pos_idx must have one column, got ", pos_idx.size(1));
  }

  void set_noise(const Tensor& log_normalizer /* [M, M] */, double eps) {
    TORCH_CHECK(std::isfinite(eps) && eps >= 0, "eps must be finite and not negative, got ", eps);
    log_normalizer_ = prepare(log_normalizer, type, {M, M}, "log_normalizer");
    eps_ = eps;
  }

  void run(Mode mode) {
    if (mode == Mode::kForward) lse_ = zeros({M, M, B});
    if (mode == Mode::kFused) rows_ = zeros({M, M, B});
    if (mode != Mode::kForward) grad_ = at::empty({M, B, D}, nodes_.options());
    if (type == at::kDouble)
      kernels().bank_nce_double(arguments<double>(), mode);
    else
      kernels().bank_nce_float(arguments<float>(), mode);
    if (!all_finite({lse_, rows_, grad_, tangents_, log_normalizer_})) run_plain(mode);
  }

  const Tensor& lse() const { return lse_; }
  const Tensor& rows() const { return rows_; }
  Tensor grad() const { return grad_.to(input_type_); }
  const Tensor& wide_grad() const { return grad_; }

private:
  void run_plain(Mode mode) {
    const std::vector<int64_t> dims = mode == Mode::kForward ? std::vector<int64_t>{-1}
                                      : mode == Mode::kFused ? std::vector<int64_t>{1, -1}
                                                             : std::vector<int64_t>{1};
    const Tensors found = by_samples(dims, [&](int64_t first, int64_t count) {
      const Tensor pos_idx = pos_idx_.narrow(0, first, count);
      const Tensor neg_idx = neg_idx_.narrow(0, first, count);
      const Tensors nodes{nodes_.narrow(1, first, count)};
      if (mode == Mode::kForward)
        return plain_values(plain_bank_lse(banks_, pos_idx, neg_idx, temperature_), nodes);
      const PlainForm form =
          plain_bank_nce(banks_, pos_idx, neg_idx, log_normalizer_, temperature_, eps_);
      const Tensors mean{at::full({M, M, count}, 1.0 / double(B), nodes_.options())};
      if (mode == Mode::kDoubleBackward)
        return plain_second(form, nodes, mean, {tangents_.narrow(1, first, count)});
      Tensors made = plain_gradient(form, nodes, mean);
      made.push_back(plain_values(form, nodes)[0]);
      return made;
    });
    (mode == Mode::kForward ? lse_ : grad_) = found[0];
    if (mode == Mode::kFused) rows_ = found[1];
  }

  template <class T> BankNce<T> arguments() const {
    const double noise = double(neg_idx_.size(1)) / double(n);
    BankNce<T> p;
    p.keys = keys();
    p.batch = B, p.temperature = temperature_;
    p.log_noise = std::log(noise + eps_), p.log_noise_excess = std::log1p(eps_ / noise);
    p.nodes = data<T>(nodes_), p.tangents = data<T>(tangents_);
    p.log_normalizer = data<T>(log_normalizer_);
    p.lse = data<T>(lse_), p.rows = data<T>(rows_), p.grad_nodes = data<T>(grad_);
    return p;
  }

  double eps_ = 0;
  Tensor log_normalizer_, lse_, rows_, grad_;
};

Tensor bank_nce_lse(const Tensor& nodes, const Tensor& banks, const Tensor& pos_idx,
                    const Tensor& neg_idx, double temperature) {
  BankNceCall call(nodes, banks, pos_idx, neg_idx, temperature);
  call.run(Mode::kForward);
  return call.lse();
}

Tensors2 bank_nce_fused(const Tensor& nodes, const Tensor& banks, const Tensor& pos_idx,
                        const Tensor& neg_idx, const Tensor& log_normalizer, double temperature,
                        double eps) {
  BankNceCall call(nodes, banks, pos_idx, neg_idx, temperature);
  call.set_noise(log_normalizer, eps);
  call.run(Mode::kFused);
  return {call.rows(), call.wide_grad()};
}

Tensor bank_nce_double_backward(const Tensor& v_nodes, const Tensor& nodes, const Tensor& banks,
                                const Tensor& pos_idx, const Tensor& neg_idx,
                                const Tensor& log_normalizer, double temperature, double eps) {
  BankNceCall call(nodes, banks, pos_idx, neg_idx, temperature);
  call.set_tangents(v_nodes);
  call.set_noise(log_normalizer, eps);
  call.run(Mode::kDoubleBackward);
  return call.grad();
}

template <class T>
BankUpdate<T> update_arguments(const Tensor& banks, const Tensor& embeddings,
                               const std::vector<int64_t>& places,
                               const std::vector<int64_t>& sources, double momentum) {
  BankUpdate<T> p;
  p.banks = banks.data_ptr(), p.element = element_of(banks);
  p.banks_count = banks.size(0), p.samples = banks.size(1), p.width = banks.size(2);
  p.batch = embeddings.size(1), p.count = static_cast<int64_t>(places.size());
  p.places = places.data(), p.sources = sources.data();
  p.embeddings = embeddings.const_data_ptr<T>(), p.momentum = momentum;
  return p;
}

void bank_update_(Tensor& banks, const Tensor& index, const Tensor& embeddings, double momentum) {
  check_banks(banks);
  check_cpu(index, "index");
  TORCH_CHECK(index.scalar_type() == at::kLong, "index must be int64, got ", index.scalar_type());
  TORCH_CHECK(index.dim() == 1, "index must be [B], got ", index.sizes());
  check_floating(embeddings, "embeddings");
  TORCH_CHECK(momentum >= 0 && momentum <= 1, "momentum must be in 0 .. 1, got ", momentum);
  const int64_t batch = index.size(0);
  const auto type = std::max(wide_type(banks), wide_type(embeddings));
  const Tensor x =
      prepare(embeddings, type, {banks.size(0), batch, banks.size(2)}, "embeddings");
  const Tensor where = index.contiguous();
  const int64_t* place = where.const_data_ptr<int64_t>();
  check_range(place, batch, banks.size(1), "index");
  // The last sample of each place; the sort is stable.
  std::vector<int64_t> order(batch), places, sources;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return place[i] < place[j]; });
  for (int64_t i = 0; i < batch; ++i) {
    if (i + 1 < batch && place[order[i]] == place[order[i + 1]]) continue;
    places.push_back(place[order[i]]);
    sources.push_back(order[i]);
  }
  if (type == at::kDouble)
    kernels().bank_update_double(update_arguments<double>(banks, x, places, sources, momentum));
  else
    kernels().bank_update_float(update_arguments<float>(banks, x, places, sources, momentum));
  // A backward that saved the banks before must not go on with other values.
  if (!banks.is_inference()) banks.unsafeGetTensorImpl()->bump_version();
}

const int32_t* table(const Tensor& x, int64_t size, const char* name, const char* shape) {
  check_cpu(x, name);
  TORCH_CHECK(x.scalar_type() == at::kInt, name, " must be int32, got ", x.scalar_type());
  TORCH_CHECK(x.dim() == 1 && (size < 0 || x.size(0) == size), name, " must be ", shape,
              size < 0 ? "" : "=[" + std::to_string(size) + "]", ", got ", x.sizes());
  TORCH_CHECK(x.is_contiguous(), name, " must be contiguous, got strides ", x.strides());
  return x.const_data_ptr<int32_t>();
}

Tensors2 sample_contrast(const Tensor& index, const Tensor& order, const Tensor& position,
                         const Tensor& labels, const Tensor& starts, int64_t num_positives,
                         int64_t num_negatives, int64_t seed, int64_t step) {
  check_cpu(index, "index");
  TORCH_CHECK(index.scalar_type() == at::kLong, "index must be int64, got ", index.scalar_type());
  TORCH_CHECK(index.dim() == 1, "index must be [B], got ", index.sizes());
  SampleContrast p;
  p.order = table(order, -1, "order", "[n]");
  p.samples = order.size(0);
  p.position = table(position, p.samples, "position", "[n]");
  p.labels = table(labels, p.samples, "labels", "[n]");
  p.starts = table(starts, -1, "starts", "[C + 1]");
  TORCH_CHECK(num_positives >= 0, "num_positives must not be negative, got ", num_positives);
  TORCH_CHECK(num_negatives >= 1, "num_negatives must be at least 1, got ", num_negatives);
  TORCH_CHECK(step >= 0 && step <= std::numeric_limits<uint32_t>::max(),
              "step must be in 0 .. 4294967295, got ", step);
  const Tensor anchors = index.contiguous();
  p.batch = anchors.numel(), p.index = anchors.const_data_ptr<int64_t>();
  if (p.batch > 0) check_range(p.index, p.batch, p.samples, "index");
  // Only the entries that the draws use: the tables are as long as the data set.
  for (int64_t r = 0; r < p.batch; ++r) {
    const int64_t anchor = p.index[r], label = p.labels[anchor];
    TORCH_CHECK(label >= 0 && label + 1 < starts.size(0), "labels must be in 0 .. ",
                starts.size(0) - 2, ", got ", label);
    const int64_t start = p.starts[label], end = p.starts[label + 1];
    TORCH_CHECK(start >= 0 && end <= p.samples, "starts must be in 0 .. ", p.samples, ", got ",
                start < 0 ? start : end);
    TORCH_CHECK(p.position[anchor] >= start && p.position[anchor] < end,
                "position must be inside the class of its sample, ", start, " .. ", end - 1,
                ", got ", p.position[anchor]);
    TORCH_CHECK(end - start < p.samples, "labels must name at least two classes, got one: no "
                "sample is a negative");
  }
  const auto options = anchors.options();
  const Tensor pos_idx = at::empty({p.batch, 1 + num_positives}, options);
  const Tensor neg_idx = at::empty({p.batch, num_negatives}, options);
  p.positives_count = num_positives, p.negatives_count = num_negatives;
  p.seed = static_cast<uint64_t>(seed), p.step = static_cast<uint32_t>(step);
  p.positives = pos_idx.data_ptr<int64_t>(), p.negatives = neg_idx.data_ptr<int64_t>();
  kernels().sample_contrast(p);
  return {pos_idx, neg_idx};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(mclfast_cpu, m) {
  for (const char* schema : kBankSchemas) m.def(schema);
}

TORCH_LIBRARY_IMPL(mclfast_cpu, CPU, m) {
  m.impl("bank_mcl_forward", &bank_mcl_forward);
  m.impl("bank_mcl_backward", &bank_mcl_backward);
  m.impl("bank_mcl_fused", &bank_mcl_fused);
  m.impl("bank_mcl_double_backward", &bank_mcl_double_backward);
  m.impl("bank_nce_lse", &bank_nce_lse);
  m.impl("bank_nce_fused", &bank_nce_fused);
  m.impl("bank_nce_double_backward", &bank_nce_double_backward);
  m.impl("bank_update_", &bank_update_);
  m.impl("sample_contrast", &sample_contrast);
}

} // namespace mclfast::cpu
