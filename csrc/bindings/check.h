// Checks of what a caller gave; the only place that words an error.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace dllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raise RuntimeError (in Python) with the parts put together unless `condition` holds.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) {
    return;
  }
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// "[3, 4]"
inline std::string list(torch::headeronly::IntHeaderOnlyArrayRef numbers) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < numbers.size(); ++i) {
    text << (i == 0 ? "" : ", ") << numbers[i];
  }
  text << ']';
  return text.str();
}

inline std::string shape(const Tensor& tensor) { return list(tensor.sizes()); }
inline std::string strides(const Tensor& tensor) { return list(tensor.strides()); }

// Check that an argument has the given type, is contiguous and lies on the device of `first`.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType type, const Tensor& first) {
  check(tensor.scalar_type() == type, op, ": ", name, " must be ", type, ", got ", tensor.scalar_type(),
        "; convert it with .to()");
  check(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides ", strides(tensor),
        "; call .contiguous()");
  check(tensor.device() == first.device(), op, ": ", name,
        " must be on the device of the first argument; move all to one device");
}

}  // namespace dllm
