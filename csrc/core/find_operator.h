// Operators by name.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace sqloss::core {

// An operator through the dispatcher. Look it up once: static const auto op = ...
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace sqloss::core
