// What the operations' autograd.cpp share.
//
// Derivatives are written as torch's own generated ones are, a Node for reverse mode and tangents
// for forward mode, and not as a torch::autograd::Function: that one torch.func transforms refuse.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <initializer_list>
#include <mutex>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/find_operator.h"

namespace sqloss::core {

using OptionalTensor = std::optional<at::Tensor>;

inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// A node of the graph, in the pointer by which this version of torch holds nodes.
template <typename T>
auto make_node() {
  if constexpr (std::is_same_v<decltype(torch::autograd::Edge::function),
                               std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<T>();
  } else {
    return c10::make_intrusive<T>();
  }
}

// A node that saves tensors, and what else compiled autograd must know of it.
class SavingNode : public torch::autograd::Node {
 public:
  // Inputs of the operator; an output of it as a detached alias, because the output itself owns
  // this node: neither would ever be freed.
  void save(std::initializer_list<OptionalTensor> tensors) {
    for (const OptionalTensor& tensor : tensors) saved_.emplace_back(tensor, /*is_output=*/false);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& saved : saved_) saved.reset_data();
  }

  // Compiled autograd: what the node depends on, and its call on traced stand-ins for it.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const auto& saved : saved_) args.collect(saved, /*is_output=*/false);
    collect_constants(args);
  }
  torch::autograd::variable_list apply_with_saved(
      const torch::autograd::variable_list& grads,
      torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (auto& saved : saved_) swap.before(saved);
    auto gradients = apply(torch::autograd::variable_list(grads));
    for (auto& saved : saved_) swap.after(saved);
    return gradients;
  }

 protected:
  virtual void collect_constants(torch::dynamo::autograd::CompiledNodeArgs&) const = 0;

  // In the order of save(); undefined where there was none.
  std::vector<at::Tensor> unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<at::Tensor> tensors;
    for (const auto& saved : saved_) tensors.push_back(saved.unpack());
    return tensors;
  }

 private:
  std::vector<torch::autograd::SavedVariable> saved_;
};

// Forward mode: the value without its tangent, and the tangent.
inline at::Tensor primal(const at::Tensor& tensor) {
  return torch::autograd::isFwGradDefined(tensor) ? tensor._fw_primal(/*level=*/0) : tensor;
}
inline OptionalTensor tangent(const OptionalTensor& tensor) {
  if (!torch::autograd::isFwGradDefined(tensor)) return std::nullopt;
  return tensor->_fw_grad(/*level=*/0);
}
inline void set_tangent(const at::Tensor& tensor, const at::Tensor& tangent) {
  tensor._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

inline void refuse_gradient(std::string_view function, const char* argument,
                            const OptionalTensor& tensor) {
  TORCH_CHECK_VALUE(
      !torch::autograd::compute_requires_grad(tensor) && !torch::autograd::isFwGradDefined(tensor),
      function, ": ", argument,
      ": expected a tensor without gradient (the derivative in it is not implemented), got one "
      "that requires it");
}

}  // namespace sqloss::core
