// Checks of what a caller gave; the only place that words an error.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "dllm/types.h"

namespace dllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Sizes = std::vector<int64_t>;

// Raise RuntimeError (in Python) with the op's name and the parts put together unless `condition` holds.
template <typename... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (condition) {
    return;
  }
  std::ostringstream message;
  message << op << ": ";
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

// "cpu" or "cuda:0"
inline std::string device(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "cpu";
}

inline void check_count(const char* op, const char* name, const std::vector<Tensor>& tensors, size_t expected,
                        const char* names) {
  check(tensors.size() == expected, op, name, " must be ", expected, " tensors, got ", tensors.size(), "; give ",
        names);
}

// `sizes` says in words what the dimensions are.
inline void check_dims(const char* op, const char* name, const Tensor& tensor, int64_t dim, const char* sizes) {
  check(tensor.dim() == dim, op, name, " must be ", sizes, ", got ", shape(tensor), "; reshape it");
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, const Sizes& sizes,
                        const char* remedy) {
  check(shape(tensor) == list(sizes), op, name, " must be ", list(sizes), ", got ", shape(tensor), "; ", remedy);
}

inline void check_type(const char* op, const char* name, const Tensor& tensor, ScalarType type) {
  check(tensor.scalar_type() == type, op, name, " must be ", type, ", got ", tensor.scalar_type(),
        "; convert it with .to()");
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.is_contiguous(), op, name, " must be contiguous, got strides ", strides(tensor), "; call .contiguous()");
}

inline void check_last_contiguous(const char* op, const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  check(tensor.stride(last) == 1 || tensor.size(last) <= 1 || tensor.numel() == 0, op, name,
        " must be contiguous in its last dimension, got strides ", strides(tensor), "; call .contiguous()");
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  check(tensor.device() == first.device(), op, name, " must be on ", device(first), " as the first argument, got ",
        device(tensor), "; move all to one device");
}

// Check that an argument has the given type, is contiguous and lies on the device of `first`.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType type, const Tensor& first) {
  check_type(op, name, tensor, type);
  check_contiguous(op, name, tensor);
  check_device(op, name, tensor, first);
}

inline FloatType float_type(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op, name,
        " must be float32, float16 or bfloat16, got ", type, "; convert it with .to()");
  return type == ScalarType::Float  ? FloatType::kFloat32
         : type == ScalarType::Half ? FloatType::kFloat16
                                    : FloatType::kBFloat16;
}

}  // namespace dllm
