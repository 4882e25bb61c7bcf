// The losses as plain operations of ATen, for arguments outside the range of the kernels: values
// that are not finite, or so large that a product overflows. What is not finite in
// mclfast/losses/reference.py is then not finite here either, in every derivative, because the
// operations and their order are the same and autograd differentiates them.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

namespace mclfast::cpu {

using Tensors = std::vector<at::Tensor>;

// The largest magnitude in a contiguous tensor of float32 or float64; NaN where an element is NaN.
double largest_magnitude(const at::Tensor& x);

// Whether every element of every tensor is finite; tensors that are not defined count as finite.
bool all_finite(at::ArrayRef<at::Tensor> tensors);

// Whether the kernels of losses in the batch are right for these arguments: every product of a
// gradient stays far from the largest number of `type`.
//   factors: tensors [..., D] whose products, divided by temperature, are the logits.
//   cotangents, tangents: may be undefined, where a mode has none.
bool kernels_apply(at::ScalarType type, at::ArrayRef<at::Tensor> factors, double temperature,
                   at::ArrayRef<at::Tensor> cotangents, at::ArrayRef<at::Tensor> tangents);

// The cotangents of the families in a bit mask; the others are undefined and take no part.
Tensors of_families(const at::Tensor* cotangents, int64_t families);

// One loss as a function of its differentiable inputs; outputs in the order of their cotangents.
using PlainForm = std::function<Tensors(const Tensors& inputs)>;

Tensors plain_values(const PlainForm& form, const Tensors& inputs);

// Gradients of the inputs. An output whose cotangent is not defined takes no part.
Tensors plain_gradient(const PlainForm& form, const Tensors& inputs, const Tensors& cotangents);

// Gradients of <tangents, plain_gradient> for the inputs and then for the cotangents.
Tensors plain_second(const PlainForm& form, const Tensors& inputs, const Tensors& cotangents,
                     const Tensors& tangents);

// vcl [N, R], soft_vcl, icl, soft_icl [N, N, R] of nodes [N, B, D].
PlainForm plain_mcl_rows(const at::Tensor& labels, std::vector<int64_t> networks,
                         double temperature, double kl_temperature, int64_t row_start,
                         int64_t row_count);

// Log-sum-exp of rows and columns and the diagonal, [B] each, of a and b [B, D].
PlainForm plain_info_nce(double temperature);

// vcl [N, B], soft_vcl [N, N, B], icl [M, N, B], soft_icl [N, N, B] of nodes [N, B, D].
PlainForm plain_bank_mcl(const at::Tensor& banks, const at::Tensor& pos_idx,
                         const at::Tensor& neg_idx, std::vector<int64_t> networks,
                         double temperature, double kl_temperature);

// Log-sum-exp of all logits, [M, M, B], 0 on the diagonal, of nodes [M, B, D].
PlainForm plain_bank_lse(const at::Tensor& banks, const at::Tensor& pos_idx,
                         const at::Tensor& neg_idx, double temperature);

// Rows of noise-contrastive estimation, [M, M, B], 0 on the diagonal, of nodes [M, B, D].
PlainForm plain_bank_nce(const at::Tensor& banks, const at::Tensor& pos_idx,
                         const at::Tensor& neg_idx, const at::Tensor& log_normalizer,
                         double temperature, double eps);

} // namespace mclfast::cpu
