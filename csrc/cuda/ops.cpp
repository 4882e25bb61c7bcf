// The CUDA operators of namespace mclfast_cuda: argument checks, outputs, the call of the kernels.
// Registration under public names, with fakes and autograd, is done in Python.
#include <cmath>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../bank_schemas.h"
#include "../families.h"
#include "launch.h"

namespace mclfast::cuda {
namespace {

using at::Tensor;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

int type_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat: return kFloat32;
    case at::kBFloat16: return kBFloat16;
    case at::kHalf: return kFloat16;
    default:
      TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 on a GPU, got ",
                  x.scalar_type());
  }
}

c10::Device gpu_of(const Tensor& x, const char* name) {
  TORCH_CHECK(x.is_cuda(), name, " must be on a GPU, got ", x.device());
  return x.device();
}

void check_device(const Tensor& x, c10::Device device, const char* name) {
  TORCH_CHECK(x.device() == device, name, " must be on ", device, ", got ", x.device());
}

void check_positive(double value, const char* name) {
  TORCH_CHECK(std::isfinite(value) && value > 0, name, " must be finite and positive, got ", value);
}

// Contiguous, of the type and shape given.
Tensor prepare(const Tensor& x, c10::Device device, at::ScalarType type, at::IntArrayRef shape,
               const char* name) {
  check_device(x, device, name);
  TORCH_CHECK(x.sizes() == shape, name, " must be ", shape, ", got ", x.sizes());
  return x.to(type).contiguous();
}

// Address of device memory, or of page-locked host memory as the device sees it.
void* device_pointer(const Tensor& x, c10::Device device, const char* name) {
  TORCH_CHECK(x.is_contiguous(), name, " must be contiguous, got strides ", x.strides());
  if (!x.device().is_cpu()) {
    check_device(x, device, name);
    return x.data_ptr();
  }
  TORCH_CHECK(x.is_pinned(), name, " must be on ", device, " or in page-locked memory, got ",
              "pageable memory of the CPU");
  void* mapped = nullptr;
  C10_CUDA_CHECK(cudaHostGetDevicePointer(&mapped, x.data_ptr(), 0));
  return mapped;
}

int64_t row_stride(const Tensor& x, c10::Device device, int64_t rows, const char* name) {
  check_device(x, device, name);
  TORCH_CHECK(x.scalar_type() == at::kLong && x.dim() == 2 && x.size(0) == rows && x.size(1) >= 1,
              name, " must be int64 [", rows, ", at least 1], got ", x.scalar_type(), " ",
              x.sizes());
  TORCH_CHECK(x.size(1) == 1 || x.stride(1) == 1, name,
              " must have a contiguous last dimension, got strides ", x.strides());
  return x.stride(0);
}

void check_launch(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next check of anyone would report it
  TORCH_CHECK(error != cudaErrorInvalidConfiguration, op,
              ": nodes, networks and width together need more shared memory than a block has");
  C10_CUDA_CHECK(error);
}

// Nodes whose gradient comes out in float32: it meets its cotangent, which may be a loss scale, before
// it is rounded to half precision.
Tensor widened(const Tensor& nodes) {
  type_of(nodes, "nodes");
  return nodes.to(at::kFloat);
}

// One call of the bank_mcl_* or bank_nce_* family: checked arguments, the tensors that keep them
// alive, outputs, and the device and stream of the call.
class BankCall {
 public:
  Bank bank{};

  BankCall(const Tensor& nodes, const Tensor& banks, const Tensor& pos_idx, const Tensor& neg_idx,
           at::IntArrayRef networks, double temperature, double kl_temperature, int64_t families)
      : guard_(gpu_of(nodes, "nodes")), nodes_(nodes.contiguous()) {
    TORCH_CHECK(nodes.dim() == 3 && nodes.size(0) >= 1 && nodes.size(2) >= 1,
                "nodes must be [N, B, D], got ", nodes.sizes());
    TORCH_CHECK(banks.dim() == 3 && banks.size(0) >= 1 && banks.size(2) == nodes.size(2),
                "banks must be [M, n, ", nodes.size(2), "], got ", banks.sizes());
    TORCH_CHECK(banks.size(1) <= INT32_MAX, "banks must have fewer than 2^31 rows, got ",
                banks.size(1));
    TORCH_CHECK(nodes.size(0) <= kMaxNodes, "nodes must be at most ", kMaxNodes, ", got ",
                nodes.size(0));
    TORCH_CHECK(static_cast<int64_t>(networks.size()) == nodes.size(0),
                "networks must have one entry per node, got ", networks.size(), " for ",
                nodes.size(0));
    check_positive(temperature, "temperature");
    check_positive(kl_temperature, "kl_temperature");
    bank.node_type = type_of(nodes, "nodes");
    bank.bank_type = type_of(banks, "banks");
    bank.nodes = nodes_.data_ptr();
    bank.banks = device_pointer(banks, device(), "banks");
    bank.node_count = nodes.size(0), bank.network_count = banks.size(0);
    bank.batch = nodes.size(1), bank.width = nodes.size(2), bank.samples = banks.size(1);
    bank.pos_stride = row_stride(pos_idx, device(), bank.batch, "pos_idx");
    bank.neg_stride = row_stride(neg_idx, device(), bank.batch, "neg_idx");
    bank.pos_idx = pos_idx.data_ptr<int64_t>(), bank.neg_idx = neg_idx.data_ptr<int64_t>();
    bank.positives = pos_idx.size(1) - 1, bank.negatives = neg_idx.size(1);
    bank.temperature = temperature, bank.kl_temperature = kl_temperature;
    bank.families = families;
    for (int i = 0; i < bank.node_count; ++i) {
      TORCH_CHECK(0 <= networks[i] && networks[i] < bank.network_count,
                  "networks must be from 0 to ", bank.network_count - 1, ", got ", networks[i]);
      bank.networks[i] = networks[i];
    }
  }

  Cotangents cotangents(const Tensor& vcl, const Tensor& soft_vcl, const Tensor& icl,
                        const Tensor& soft_icl) {
    const int64_t n = bank.node_count, m = bank.network_count, b = bank.batch;
    g_[0] = prepare(vcl, device(), at::kFloat, {n, b}, "g_vcl");
    g_[1] = prepare(soft_vcl, device(), at::kFloat, {n, n, b}, "g_soft_vcl");
    g_[2] = prepare(icl, device(), at::kFloat, {m, n, b}, "g_icl");
    g_[3] = prepare(soft_icl, device(), at::kFloat, {n, n, b}, "g_soft_icl");
    return {data(g_[0]), data(g_[1]), data(g_[2]), data(g_[3])};
  }

  Rows rows() {
    const int64_t n = bank.node_count, m = bank.network_count, b = bank.batch;
    rows_[0] = empty({n, b}), rows_[1] = empty({n, n, b});
    rows_[2] = empty({m, n, b}), rows_[3] = empty({n, n, b});
    return {data(rows_[0]), data(rows_[1]), data(rows_[2]), data(rows_[3])};
  }

  float* new_statistic(int which) {
    statistics_[which] = empty({bank.network_count, bank.node_count, bank.batch});
    return data(statistics_[which]);
  }
  const float* statistic(int which, const Tensor& x, const char* name) {
    statistics_[which] = prepare(x, device(), at::kFloat,
                                 {bank.network_count, bank.node_count, bank.batch}, name);
    return data(statistics_[which]);
  }
  const float* normalizer(const Tensor& x) {
    normalizer_ = prepare(x, device(), at::kFloat, {bank.network_count, bank.network_count},
                          "log_normalizer");
    return data(normalizer_);
  }
  const void* tangents(const Tensor& x) {
    tangents_ = prepare(x, device(), nodes_.scalar_type(), nodes_.sizes(), "v_nodes");
    return tangents_.data_ptr();
  }
  void* new_grad() {
    grad_ = at::empty_like(nodes_);
    return grad_.data_ptr();
  }
  void* workspace() {
    size_t bytes = 0;
    C10_CUDA_CHECK(bank_workspace(bank, &bytes));
    workspace_ = at::empty({static_cast<int64_t>(bytes)}, nodes_.options().dtype(at::kByte));
    return workspace_.data_ptr();
  }
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(device().index()).stream(); }

  const Tensor& row(int which) const { return rows_[which]; }
  const Tensor& kept(int which) const { return statistics_[which]; }
  const Tensor& grad() const { return grad_; }

 private:
  c10::Device device() const { return nodes_.device(); }
  Tensor empty(at::IntArrayRef shape) const {
    return at::empty(shape, nodes_.options().dtype(at::kFloat));
  }
  static float* data(const Tensor& x) { return x.data_ptr<float>(); }

  c10::cuda::CUDAGuard guard_;
  Tensor nodes_, tangents_, normalizer_, g_[4], rows_[4], statistics_[2], grad_, workspace_;
};

Tensors6 bank_mcl_forward_op(const Tensor& nodes, const Tensor& banks, const Tensor& pos_idx,
                             const Tensor& neg_idx, at::IntArrayRef networks, double temperature,
                             double kl_temperature, int64_t families) {
  BankCall c(nodes, banks, pos_idx, neg_idx, networks, temperature, kl_temperature, families);
  check_launch(bank_mcl_forward(c.bank, c.rows(), c.new_statistic(0), c.new_statistic(1),
                                c.workspace(), c.stream()),
               "bank_mcl_forward");
  return {c.row(0), c.row(1), c.row(2), c.row(3), c.kept(0), c.kept(1)};
}

Tensor bank_mcl_backward_op(const Tensor& g_vcl, const Tensor& g_soft_vcl, const Tensor& g_icl,
                            const Tensor& g_soft_icl, const Tensor& nodes, const Tensor& banks,
                            const Tensor& pos_idx, const Tensor& neg_idx, at::IntArrayRef networks,
                            const Tensor& lse, const Tensor& kl_lse, double temperature,
                            double kl_temperature, int64_t families) {
  BankCall c(nodes, banks, pos_idx, neg_idx, networks, temperature, kl_temperature, families);
  check_launch(bank_mcl_backward(c.bank, c.cotangents(g_vcl, g_soft_vcl, g_icl, g_soft_icl),
                                 c.statistic(0, lse, "lse"), c.statistic(1, kl_lse, "kl_lse"),
                                 c.new_grad(), c.workspace(), c.stream()),
               "bank_mcl_backward");
  return c.grad();
}

Tensors7 bank_mcl_fused_op(const Tensor& g_vcl, const Tensor& g_soft_vcl, const Tensor& g_icl,
                           const Tensor& g_soft_icl, const Tensor& nodes, const Tensor& banks,
                           const Tensor& pos_idx, const Tensor& neg_idx, at::IntArrayRef networks,
                           double temperature, double kl_temperature, int64_t families) {
  BankCall c(widened(nodes), banks, pos_idx, neg_idx, networks, temperature, kl_temperature,
             families);
  check_launch(bank_mcl_fused(c.bank, c.cotangents(g_vcl, g_soft_vcl, g_icl, g_soft_icl), c.rows(),
                              c.new_statistic(0), c.new_statistic(1), c.new_grad(), c.workspace(),
                              c.stream()),
               "bank_mcl_fused");
  return {c.row(0), c.row(1), c.row(2), c.row(3), c.kept(0), c.kept(1), c.grad()};
}

Tensors5 bank_mcl_double_backward_op(const Tensor& v_nodes, const Tensor& g_vcl,
                                     const Tensor& g_soft_vcl, const Tensor& g_icl,
                                     const Tensor& g_soft_icl, const Tensor& nodes,
                                     const Tensor& banks, const Tensor& pos_idx,
                                     const Tensor& neg_idx, at::IntArrayRef networks,
                                     const Tensor& lse, const Tensor& kl_lse, double temperature,
                                     double kl_temperature, int64_t families) {
  BankCall c(widened(nodes), banks, pos_idx, neg_idx, networks, temperature, kl_temperature,
             families);
  check_launch(bank_mcl_double_backward(
                   c.bank, c.tangents(v_nodes), c.cotangents(g_vcl, g_soft_vcl, g_icl, g_soft_icl),
                   c.statistic(0, lse, "lse"), c.statistic(1, kl_lse, "kl_lse"), c.new_grad(),
                   c.rows(), c.workspace(), c.stream()),
               "bank_mcl_double_backward");
  return {c.grad().to(nodes.scalar_type()), c.row(0), c.row(1), c.row(2), c.row(3)};
}

BankCall nce_call(const Tensor& nodes, const Tensor& banks, const Tensor& pos_idx,
                  const Tensor& neg_idx, double temperature) {
  TORCH_CHECK(nodes.dim() == 3 && banks.dim() == 3 && nodes.size(0) == banks.size(0),
              "nodes must have one entry per bank, got ", nodes.sizes(), " for banks ",
              banks.sizes());
  TORCH_CHECK(pos_idx.dim() == 2 && pos_idx.size(1) == 1, "pos_idx must be [B, 1], got ",
              pos_idx.sizes());
  std::vector<int64_t> networks(nodes.size(0));
  for (size_t i = 0; i < networks.size(); ++i) networks[i] = static_cast<int64_t>(i);
  return BankCall(nodes, banks, pos_idx, neg_idx, networks, temperature, 1.0, kIcl);
}

Tensor bank_nce_lse_op(const Tensor& nodes, const Tensor& banks, const Tensor& pos_idx,
                       const Tensor& neg_idx, double temperature) {
  BankCall c = nce_call(nodes, banks, pos_idx, neg_idx, temperature);
  check_launch(bank_nce_lse(c.bank, c.new_statistic(0), c.workspace(), c.stream()), "bank_nce_lse");
  return c.kept(0);
}

Tensors2 bank_nce_fused_op(const Tensor& nodes, const Tensor& banks, const Tensor& pos_idx,
                           const Tensor& neg_idx, const Tensor& log_normalizer, double temperature,
                           double eps) {
  BankCall c = nce_call(widened(nodes), banks, pos_idx, neg_idx, temperature);
  check_launch(bank_nce_fused(c.bank, c.normalizer(log_normalizer), static_cast<float>(eps),
                              c.new_statistic(0), c.new_grad(), c.workspace(), c.stream()),
               "bank_nce_fused");
  return {c.kept(0), c.grad()};
}

Tensor bank_nce_double_backward_op(const Tensor& v_nodes, const Tensor& nodes, const Tensor& banks,
                                   const Tensor& pos_idx, const Tensor& neg_idx,
                                   const Tensor& log_normalizer, double temperature, double eps) {
  BankCall c = nce_call(widened(nodes), banks, pos_idx, neg_idx, temperature);
  check_launch(
      bank_nce_double_backward(c.bank, c.tangents(v_nodes), c.normalizer(log_normalizer),
                               static_cast<float>(eps), c.new_grad(), c.workspace(), c.stream()),
      "bank_nce_double_backward");
  return c.grad().to(nodes.scalar_type());
}

void bank_update_op(Tensor& banks, const Tensor& index, const Tensor& embeddings, double momentum) {
  const c10::Device device = gpu_of(embeddings, "embeddings");
  const c10::cuda::CUDAGuard guard(device);
  TORCH_CHECK(banks.dim() == 3, "banks must be [M, n, D], got ", banks.sizes());
  TORCH_CHECK(index.dim() == 1 && index.scalar_type() == at::kLong, "index must be int64 [B], got ",
              index.scalar_type(), " ", index.sizes());
  const int64_t m = banks.size(0), width = banks.size(2), batch = index.size(0);
  const Tensor x = prepare(embeddings, device, embeddings.scalar_type(), {m, batch, width},
                           "embeddings");
  const Tensor places = prepare(index, device, at::kLong, {batch}, "index");
  Update u{};
  u.bank_type = type_of(banks, "banks"), u.embedding_type = type_of(x, "embeddings");
  u.banks = device_pointer(banks, device, "banks");
  u.index = places.data_ptr<int64_t>(), u.embeddings = x.data_ptr();
  u.samples = banks.size(1), u.network_count = m, u.batch = batch, u.width = width;
  u.momentum = momentum;
  check_launch(bank_update(u, c10::cuda::getCurrentCUDAStream(device.index()).stream()),
               "bank_update_");
}

Tensors2 sample_contrast_op(const Tensor& index, const Tensor& order, const Tensor& position,
                            const Tensor& labels, const Tensor& starts, int64_t num_positives,
                            int64_t num_negatives, int64_t seed, int64_t step) {
  const c10::Device device = gpu_of(index, "index");
  const c10::cuda::CUDAGuard guard(device);
  TORCH_CHECK(index.dim() == 1 && index.scalar_type() == at::kLong, "index must be int64 [B], got ",
              index.scalar_type(), " ", index.sizes());
  TORCH_CHECK(num_positives >= 0, "num_positives must be 0 or more, got ", num_positives);
  TORCH_CHECK(num_negatives >= 1, "num_negatives must be 1 or more, got ", num_negatives);
  TORCH_CHECK(starts.dim() == 1 && starts.numel() > 2,
              "starts must be [C + 1] of two classes or more, got ", starts.sizes());
  const auto table = [&](const Tensor& x, int64_t size, const char* name) {
    TORCH_CHECK(x.scalar_type() == at::kInt, name, " must be int32, got ", x.scalar_type());
    return prepare(x, device, at::kInt, {size}, name);
  };
  const int64_t n = order.numel();
  const Tensor tables[4] = {table(order, n, "order"), table(position, n, "position"),
                            table(labels, n, "labels"), table(starts, starts.numel(), "starts")};
  const Tensor anchors = index.contiguous();
  const Tensor pos = at::empty({index.size(0), 1 + num_positives}, index.options());
  const Tensor neg = at::empty({index.size(0), num_negatives}, index.options());
  Sample s{};
  s.index = anchors.data_ptr<int64_t>();
  s.order = tables[0].data_ptr<int32_t>(), s.position = tables[1].data_ptr<int32_t>();
  s.labels = tables[2].data_ptr<int32_t>(), s.starts = tables[3].data_ptr<int32_t>();
  s.samples = n, s.batch = index.size(0);
  s.positives = num_positives, s.negatives = num_negatives;
  s.seed = static_cast<uint64_t>(seed), s.step = static_cast<uint32_t>(step);
  s.pos_idx = pos.data_ptr<int64_t>(), s.neg_idx = neg.data_ptr<int64_t>();
  check_launch(sample_contrast(s, c10::cuda::getCurrentCUDAStream(device.index()).stream()),
               "sample_contrast");
  return {pos, neg};
}

}  // namespace

TORCH_LIBRARY(mclfast_cuda, m) {
  for (const char* schema : kBankSchemas) m.def(schema);
}

// A bank in page-locked host memory comes with arguments on the GPU, and CUDA then takes the call.
TORCH_LIBRARY_IMPL(mclfast_cuda, CUDA, m) {
  m.impl("bank_mcl_forward", &bank_mcl_forward_op);
  m.impl("bank_mcl_backward", &bank_mcl_backward_op);
  m.impl("bank_mcl_fused", &bank_mcl_fused_op);
  m.impl("bank_mcl_double_backward", &bank_mcl_double_backward_op);
  m.impl("bank_nce_lse", &bank_nce_lse_op);
  m.impl("bank_nce_fused", &bank_nce_fused_op);
  m.impl("bank_nce_double_backward", &bank_nce_double_backward_op);
  m.impl("bank_update_", &bank_update_op);
  m.impl("sample_contrast", &sample_contrast_op);
}

}  // namespace mclfast::cuda
