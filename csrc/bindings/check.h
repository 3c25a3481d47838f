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
inline std::string shape(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    text << (dim == 0 ? "" : ", ") << tensor.size(dim);
  }
  text << ']';
  return text.str();
}

}  // namespace dllm
