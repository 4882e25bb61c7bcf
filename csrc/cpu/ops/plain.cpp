#include "plain.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>

namespace mclfast::cpu {
namespace {

using at::Tensor;

// Magnitudes of one sign order like their bits, with NaN above infinity, and a maximum of integers
// is one vector instruction.
template <class T, class Bits> double largest_of(const Tensor& x) {
  constexpr int64_t kApart = 64; // maxima that do not wait for one another
  const T* data = x.const_data_ptr<T>();
  const int64_t count = x.numel(), whole = count / kApart * kApart;
  const auto magnitude = [data](int64_t i) {
    Bits bits;
    std::memcpy(&bits, data + i, sizeof(T));
    return Bits(bits & std::numeric_limits<Bits>::max());
  };
  Bits tops[kApart] = {}, top = 0;
  for (int64_t i = 0; i < whole; i += kApart)
    for (int64_t k = 0; k < kApart; ++k) tops[k] = std::max(tops[k], magnitude(i + k));
  for (int64_t i = whole; i < count; ++i) top = std::max(top, magnitude(i));
  for (const Bits one : tops) top = std::max(top, one);
  T value;
  std::memcpy(&value, &top, sizeof(T));
  return value;
}

// Kernels run below autograd; this brings it back for their own use, from inference mode too.
Tensors leaves(const Tensors& from, bool differentiable) {
  Tensors made;
  for (const Tensor& x : from)
    made.push_back(x.defined() ? x.clone().set_requires_grad(differentiable) : x);
  return made;
}

struct Differentiated {
  Tensors inputs, cotangents, gradient;
};

Differentiated differentiate(const PlainForm& form, const Tensors& inputs,
                             const Tensors& cotangents, bool again) {
  Differentiated made{leaves(inputs, true), leaves(cotangents, again), {}};
  Tensors outputs, weights;
  const Tensors values = form(made.inputs);
  for (size_t i = 0; i < values.size(); ++i) {
    if (!made.cotangents[i].defined() || !values[i].requires_grad()) continue;
    outputs.push_back(values[i]);
    weights.push_back(made.cotangents[i]);
  }
  made.gradient.resize(inputs.size());
  if (!outputs.empty())
    made.gradient = torch::autograd::grad(outputs, made.inputs, weights, again, again, true);
  for (size_t i = 0; i < inputs.size(); ++i)
    if (!made.gradient[i].defined()) made.gradient[i] = at::zeros_like(inputs[i]);
  return made;
}

Tensor similarity(const Tensor& anchors, const Tensor& contrast, double temperature) {
  return at::matmul(anchors, contrast.t()) / temperature;
}

struct Masks {
  Tensor is_self, positives; // [R, B]
};

Masks batch_masks(const Tensor& labels, int64_t row_start, int64_t row_count) {
  const Tensor columns = at::arange(labels.size(0), labels.options().dtype(at::kLong));
  const Tensor anchors = columns.narrow(0, row_start, row_count);
  const Tensor is_self = anchors.unsqueeze(1) == columns.unsqueeze(0);
  const Tensor same =
      labels.narrow(0, row_start, row_count).unsqueeze(1) == labels.unsqueeze(0);
  return {is_self, at::logical_and(same, at::logical_not(is_self))};
}

Tensor contrastive_rows(const Tensor& logits, const Masks& masks) {
  const Tensor count = masks.positives.sum(-1), has_positive = count > 0;
  const Tensor hidden = at::logical_and(masks.is_self, has_positive.unsqueeze(1));
  const Tensor others = logits.masked_fill(hidden, -std::numeric_limits<double>::infinity());
  const Tensor mean = (logits * masks.positives).sum(-1) / count.clamp_min(1);
  return at::where(has_positive, others.logsumexp(-1) - mean, 0.0);
}

Tensor distribution_kl_rows(const Tensor& student, const Tensor& teacher, double kl_temperature) {
  const Tensor log_p = at::log_softmax(teacher.detach() / kl_temperature, -1);
  const Tensor log_q = at::log_softmax(student / kl_temperature, -1);
  return (log_p.exp() * (log_p - log_q)).sum(-1) * (kl_temperature * kl_temperature);
}

Tensor first_columns_rows(const Tensor& logits, int64_t positives) {
  if (positives == 0) return logits.new_zeros(logits.size(0));
  return logits.logsumexp(-1) - logits.narrow(1, 0, positives).mean(-1);
}

// A table of rows as one tensor [I, J, R].
class Table {
public:
  Table(int64_t rows, int64_t columns, const Tensor& zero)
      : columns_(columns), entries_(rows * columns, zero) {}
  Tensor& operator()(int64_t i, int64_t j) { return entries_[i * columns_ + j]; }
  Tensor stacked() const {
    const int64_t rows = static_cast<int64_t>(entries_.size()) / columns_;
    return at::stack(entries_).unflatten(0, {rows, columns_});
  }

private:
  int64_t columns_;
  Tensors entries_;
};

// z[k] of every sample: bank[keys[r, k]] . embeddings[r] / temperature, [B, K1].
Tensor bank_logits(const Tensor& embeddings, const Tensor& bank, const Tensor& keys,
                   double temperature) {
  const Tensor rows = bank.index({keys}).to(embeddings.scalar_type());
  return at::einsum("bkd,bd->bk", {rows, embeddings}) / temperature;
}

// The keys of every sample, the anchor's own entry first.
Tensor all_keys(const Tensor& pos_idx, const Tensor& neg_idx) {
  return at::cat({pos_idx, neg_idx}, 1);
}

} // namespace

double largest_magnitude(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? largest_of<double, int64_t>(x)
                                        : largest_of<float, int32_t>(x);
}

bool all_finite(at::ArrayRef<Tensor> tensors) {
  for (const Tensor& x : tensors)
    if (x.defined() && !std::isfinite(largest_magnitude(x))) return false;
  return true;
}

bool kernels_apply(at::ScalarType type, at::ArrayRef<Tensor> factors, double temperature,
                   at::ArrayRef<Tensor> cotangents, at::ArrayRef<Tensor> tangents) {
  const double limit = type == at::kDouble ? 1e290 : 1e30;
  const auto largest = [](at::ArrayRef<Tensor> tensors) {
    double top = 1;
    for (const Tensor& x : tensors) {
      const double one = x.defined() ? largest_magnitude(x) : 0;
      if (std::isnan(one)) return one;
      top = std::fmax(top, one);
    }
    return top;
  };
  const double embedding = largest(factors), scale = double(factors[0].size(-1)) / temperature;
  const double tangent = largest(tangents);
  const double reach = embedding * std::fmax(embedding, tangent) * std::fmax(scale, 1.0);
  constexpr double kLargestLogit = 1e28; // the padding of the kernels is -1e30
  return embedding * embedding * scale <= kLargestLogit && std::isfinite(tangent) &&
         reach * reach * largest(cotangents) <= limit;
}

Tensors of_families(const Tensor* cotangents, int64_t families) {
  Tensors wanted(4);
  for (int k = 0; k < 4; ++k)
    if (families >> k & 1) wanted[k] = cotangents[k];
  return wanted;
}

Tensors plain_values(const PlainForm& form, const Tensors& inputs) {
  const at::NoGradGuard no_derivatives;
  return form(inputs);
}

Tensors plain_gradient(const PlainForm& form, const Tensors& inputs, const Tensors& cotangents) {
  const c10::InferenceMode with_autograd(false);
  return differentiate(form, inputs, cotangents, false).gradient;
}

Tensors plain_second(const PlainForm& form, const Tensors& inputs, const Tensors& cotangents,
                     const Tensors& tangents) {
  const c10::InferenceMode with_autograd(false);
  const Differentiated first = differentiate(form, inputs, cotangents, true);
  Tensors outputs, weights, variables = first.inputs;
  const Tensors directions = leaves(tangents, false);
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!first.gradient[i].requires_grad()) continue;
    outputs.push_back(first.gradient[i]);
    weights.push_back(directions[i]);
  }
  for (const Tensor& g : first.cotangents)
    if (g.defined()) variables.push_back(g);
  Tensors found(variables.size());
  if (!outputs.empty())
    found = torch::autograd::grad(outputs, variables, weights, false, false, true);
  for (size_t i = 0; i < found.size(); ++i)
    if (!found[i].defined()) found[i] = at::zeros_like(variables[i]);
  Tensors all(found.begin(), found.begin() + inputs.size());
  size_t next = inputs.size();
  for (const Tensor& g : first.cotangents) all.push_back(g.defined() ? found[next++] : Tensor());
  for (Tensor& x : all)
    if (x.defined()) x = x.detach();
  return all;
}

PlainForm plain_mcl_rows(const Tensor& labels, std::vector<int64_t> networks, double temperature,
                         double kl_temperature, int64_t row_start, int64_t row_count) {
  return [=](const Tensors& inputs) {
    const Masks masks = batch_masks(labels, row_start, row_count);
    const Tensors e = inputs[0].unbind();
    const int64_t count = static_cast<int64_t>(e.size());
    Tensors anchors, intra, vcl;
    for (int64_t a = 0; a < count; ++a) {
      anchors.push_back(e[a].narrow(0, row_start, row_count));
      intra.push_back(similarity(anchors[a], e[a], temperature));
      vcl.push_back(contrastive_rows(intra[a], masks));
    }
    const Tensor zero = e[0].new_zeros(row_count);
    Table soft_vcl(count, count, zero), icl(count, count, zero), soft_icl(count, count, zero);
    for (int64_t a = 0; a < count; ++a)
      for (int64_t b = 0; b < count; ++b) {
        if (networks[a] == networks[b]) continue;
        const Tensor a_to_b = similarity(anchors[a], e[b], temperature);
        const Tensor b_to_a = similarity(anchors[b], e[a], temperature);
        soft_vcl(a, b) = distribution_kl_rows(intra[a], intra[b], kl_temperature);
        icl(a, b) = contrastive_rows(a_to_b, masks);
        soft_icl(a, b) = distribution_kl_rows(a_to_b, b_to_a, kl_temperature);
      }
    return Tensors{at::stack(vcl), soft_vcl.stacked(), icl.stacked(), soft_icl.stacked()};
  };
}

PlainForm plain_info_nce(double temperature) {
  return [=](const Tensors& inputs) {
    const Tensor logits = similarity(inputs[0], inputs[1], temperature);
    return Tensors{logits.logsumexp(1), logits.logsumexp(0), logits.diagonal()};
  };
}

PlainForm plain_bank_mcl(const Tensor& banks, const Tensor& pos_idx, const Tensor& neg_idx,
                         std::vector<int64_t> networks, double temperature,
                         double kl_temperature) {
  const int64_t positives = pos_idx.size(1) - 1;
  return [=](const Tensors& inputs) {
    const Tensor keys = all_keys(pos_idx, neg_idx);
    const Tensors nodes = inputs[0].unbind();
    const int64_t count = static_cast<int64_t>(nodes.size()), M = banks.size(0);
    const Tensor zero = nodes[0].new_zeros(keys.size(0));
    Table z(M, count, zero), icl(M, count, zero);
    Table soft_vcl(count, count, zero), soft_icl(count, count, zero);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t e = 0; e < count; ++e) {
        z(m, e) = bank_logits(nodes[e], banks[m], keys, temperature);
        if (m != networks[e]) icl(m, e) = first_columns_rows(z(m, e), positives + 1);
      }
    Tensors intra, vcl;
    for (int64_t a = 0; a < count; ++a) {
      intra.push_back(z(networks[a], a).narrow(1, 1, keys.size(1) - 1));
      vcl.push_back(first_columns_rows(intra[a], positives));
    }
    for (int64_t a = 0; a < count; ++a)
      for (int64_t b = 0; b < count; ++b) {
        if (networks[a] == networks[b]) continue;
        soft_vcl(a, b) = distribution_kl_rows(intra[a], intra[b], kl_temperature);
        soft_icl(a, b) = distribution_kl_rows(z(networks[a], b), z(networks[b], a), kl_temperature);
      }
    return Tensors{at::stack(vcl), soft_vcl.stacked(), icl.stacked(), soft_icl.stacked()};
  };
}

PlainForm plain_bank_lse(const Tensor& banks, const Tensor& pos_idx, const Tensor& neg_idx,
                         double temperature) {
  return [=](const Tensors& inputs) {
    const Tensor keys = all_keys(pos_idx, neg_idx);
    const Tensors nodes = inputs[0].unbind();
    const int64_t M = banks.size(0);
    Table lse(M, M, nodes[0].new_zeros(keys.size(0)));
    for (int64_t m = 0; m < M; ++m)
      for (int64_t e = 0; e < M; ++e)
        if (m != e) lse(m, e) = bank_logits(nodes[e], banks[m], keys, temperature).logsumexp(-1);
    return Tensors{lse.stacked()};
  };
}

PlainForm plain_bank_nce(const Tensor& banks, const Tensor& pos_idx, const Tensor& neg_idx,
                         const Tensor& log_normalizer, double temperature, double eps) {
  const double noise = double(neg_idx.size(1)) / double(banks.size(1));
  const double log_noise = std::log(noise + eps), excess = std::log(noise) - log_noise;
  return [=](const Tensors& inputs) {
    const Tensor keys = all_keys(pos_idx, neg_idx);
    const Tensors nodes = inputs[0].unbind();
    const int64_t M = banks.size(0);
    Table rows(M, M, nodes[0].new_zeros(keys.size(0)));
    for (int64_t m = 0; m < M; ++m)
      for (int64_t e = 0; e < M; ++e) {
        if (m == e) continue;
        const Tensor log_p =
            bank_logits(nodes[e], banks[m], keys, temperature) - log_normalizer[m][e];
        const Tensor from_data = at::log_sigmoid(log_p.select(1, 0) - log_noise);
        const Tensor from_noise =
            at::log_sigmoid(log_noise - log_p.narrow(1, 1, keys.size(1) - 1)) + excess;
        rows(m, e) = -(from_data + from_noise.sum(-1));
      }
    return Tensors{rows.stacked()};
  };
}

} // namespace mclfast::cpu
