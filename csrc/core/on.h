// An operator's implementation on one kind of device: a function that takes kernels first, with
// those of that device.
#pragma once

#include <utility>

namespace sqloss::core {

template <typename Implementation>
struct WithoutKernels;

template <typename Kernels, typename Result, typename... Arguments>
struct WithoutKernels<Result(const Kernels&, Arguments...)> {
  using type = Result(Arguments...);
};

// The signature of the operator that such a function implements.
template <typename Implementation>
using Operator = typename WithoutKernels<Implementation>::type;

template <auto function, auto kernels>
struct On;

template <typename Kernels, typename Result, typename... Arguments,
          Result (*function)(const Kernels&, Arguments...), const Kernels& (*kernels)()>
struct On<function, kernels> {
  static Result call(Arguments... arguments) {
    return function(kernels(), std::forward<Arguments>(arguments)...);
  }
};

}  // namespace sqloss::core
