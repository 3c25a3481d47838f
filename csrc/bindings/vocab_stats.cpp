#include "dllm/vocab_stats.h"

#include <optional>
#include <tuple>
#include <vector>

#include "library.h"

namespace dllm {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr const char* kOp = "vocab_stats";

void check_matrix(const char* name, const Tensor& tensor, const char* sizes) {
  check_dims(kOp, name, tensor, 2, sizes);
  check_last_contiguous(kOp, name, tensor);
}

void check_weight(const Tensor& weight, const Tensor& rows) {
  check(!kRunsCudaOnCpu && !rows.is_cuda(), kOp,
        "a weight is given with rows on a GPU, where the product is the GPU libraries'; allowed is None; "
        "give logits as rows");
  check_matrix("weight", weight, "[num_ids, hidden_size]");
  check_type(kOp, "weight", weight, rows.scalar_type());
  check_device(kOp, "weight", weight, rows);
  check(weight.size(1) == rows.size(1) && rows.size(1) > 0, kOp,
        "rows must be [num_rows, hidden_size] with the hidden_size of the weight, 1 or more, got ", shape(rows),
        " and ", shape(weight), "; give the rows that this head takes");
}

void check_sampling(const MaybeTensor& tensor, const char* name, ScalarType type, const Tensor& rows) {
  check(tensor.has_value(), kOp, name, " is missing beside the other sampling parameters; give it");
  check_shape(kOp, name, *tensor, {rows.size(0)}, "give one value per row");
  check_tensor(kOp, name, *tensor, type, rows);
}

VocabSampling sampling_of(const Tensor& rows, const MaybeTensor& keys, const MaybeTensor& temperature,
                          const MaybeTensor& top_k, const MaybeTensor& top_p, int64_t first_id) {
  VocabSampling sampling = {};
  if (keys.has_value() || temperature.has_value()) {
    check_sampling(keys, "keys", ScalarType::Long, rows);
    check_sampling(temperature, "temperature", ScalarType::Double, rows);
    sampling.keys = keys->const_data_ptr<int64_t>();
    sampling.temperature = temperature->const_data_ptr<double>();
  }
  if (top_k.has_value() || top_p.has_value()) {
    check(sampling.keys != nullptr, kOp,
          "top_k and top_p filter what is drawn, but keys is None; give keys and temperature, or no "
          "filter");
    check(first_id == 0, kOp, "top_k and top_p need the logits of the whole vocabulary, but first_id is ", first_id,
          "; gather the logits and give them from id 0 on");
    check_sampling(top_k, "top_k", ScalarType::Long, rows);
    check_sampling(top_p, "top_p", ScalarType::Double, rows);
    sampling.top_k = top_k->const_data_ptr<int64_t>();
    sampling.top_p = top_p->const_data_ptr<double>();
  }
  return sampling;
}

// Enter what rows ask for and may take.
void put_row_ids(const Tensor& rows, const MaybeTensor& given_ids, const MaybeTensor& allowed, VocabStatsArgs& args) {
  if (given_ids.has_value()) {
    check_dims(kOp, "given_ids", *given_ids, 2, "[num_rows, num_given]");
    args.num_given = given_ids->size(1);
    check(args.num_given <= kMaxGiven, kOp, args.num_given, " given_ids are given per row; give at most ", kMaxGiven);
    check_shape(kOp, "given_ids", *given_ids, {args.num_rows, args.num_given}, "give as many ids for each row");
    check_tensor(kOp, "given_ids", *given_ids, ScalarType::Long, rows);
    args.given_ids = given_ids->const_data_ptr<int64_t>();
  }
  if (allowed.has_value()) {
    check_dims(kOp, "allowed", *allowed, 2, "[num_rows, num_words]");
    args.num_words = allowed->size(1);
    check(args.num_words >= (args.first_id + args.num_ids + 31) / 32, kOp, "allowed has ", args.num_words,
          " words of 32 ids per row for ids up to ", args.first_id + args.num_ids - 1,
          "; give one bit for each id of the vocabulary");
    check_shape(kOp, "allowed", *allowed, {args.num_rows, args.num_words}, "give one row of words per row");
    check_tensor(kOp, "allowed", *allowed, ScalarType::Int, rows);
    args.allowed = allowed->const_data_ptr<int32_t>();
  }
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Allocate the results and enter them in `args`; sampled sums that are not wanted have no rows.
Results new_results(const Tensor& rows, VocabStatsArgs& args, bool wants_sampled) {
  const auto empty = [&](const Sizes& sizes, ScalarType type) { return torch::stable::new_empty(rows, sizes, type); };
  Tensor top_ids = empty({args.num_rows, args.num_candidates}, ScalarType::Long);
  Tensor top_logits = empty({args.num_rows, args.num_candidates}, ScalarType::Float);
  Tensor rest = empty({args.num_rows}, ScalarType::Double);
  Tensor weighted = empty({args.num_rows}, ScalarType::Double);
  Tensor token_ids = empty({args.num_rows}, ScalarType::Long);
  Tensor token_logits = empty({args.num_rows}, ScalarType::Float);
  Tensor scores = empty({args.num_rows}, ScalarType::Double);
  const int64_t num_sampled = wants_sampled ? args.num_rows : 0;
  Tensor sampled_rest = empty({num_sampled}, ScalarType::Double);
  Tensor sampled_weighted = empty({num_sampled}, ScalarType::Double);
  Tensor given_logits = empty({args.num_rows, args.num_given}, ScalarType::Float);
  args.top_ids = top_ids.mutable_data_ptr<int64_t>();
  args.top_logits = top_logits.mutable_data_ptr<float>();
  args.rest = rest.mutable_data_ptr<double>();
  args.weighted = weighted.mutable_data_ptr<double>();
  args.token_ids = token_ids.mutable_data_ptr<int64_t>();
  args.token_logits = token_logits.mutable_data_ptr<float>();
  args.scores = scores.mutable_data_ptr<double>();
  args.sampled_rest = wants_sampled ? sampled_rest.mutable_data_ptr<double>() : nullptr;
  args.sampled_weighted = wants_sampled ? sampled_weighted.mutable_data_ptr<double>() : nullptr;
  args.given_logits = given_logits.mutable_data_ptr<float>();
  return {top_ids,      top_logits, rest,         weighted,         token_ids,
          token_logits, scores,     sampled_rest, sampled_weighted, given_logits};
}

}  // namespace

Results vocab_stats(Tensor rows, MaybeTensor weight, int64_t first_id, std::vector<int64_t> excluded_ids,
                    int64_t num_candidates, bool wants_sampled, MaybeTensor keys, MaybeTensor temperature,
                    MaybeTensor top_k, MaybeTensor top_p, MaybeTensor given_ids, MaybeTensor allowed) {
  check_matrix("rows", rows, "[num_rows, hidden_size], or [num_rows, num_ids] without a weight");
  const FloatType type = float_type(kOp, "rows", rows);
  if (weight.has_value()) {
    check_weight(*weight, rows);
  }
  const int64_t num_ids = weight.has_value() ? weight->size(0) : rows.size(1);
  check(num_ids > 0 && first_id >= 0 && first_id < INT32_MAX - num_ids, kOp, num_ids, " ids from ", first_id,
        " on are given; give 1 or more, all in [0, 2^31 - 1)");
  check(1 <= num_candidates && num_candidates <= kMaxCandidates, kOp, "num_candidates is ", num_candidates,
        "; give 1 to ", kMaxCandidates);
  check(excluded_ids.size() <= kMaxExcluded, kOp, excluded_ids.size(), " excluded_ids are given; give at most ",
        kMaxExcluded);
  VocabStatsArgs args = {};
  args.type = type;
  args.rows = rows.const_data_ptr();
  args.weight = weight.has_value() ? weight->const_data_ptr() : nullptr;
  args.row_stride = rows.stride(0);
  args.weight_stride = weight.has_value() ? weight->stride(0) : 0;
  args.num_rows = rows.size(0);
  args.num_ids = num_ids;
  args.hidden_size = weight.has_value() ? rows.size(1) : 0;
  args.first_id = first_id;
  args.num_excluded = static_cast<int32_t>(excluded_ids.size());
  args.num_candidates = static_cast<int32_t>(num_candidates);
  args.sampling = sampling_of(rows, keys, temperature, top_k, top_p, first_id);
  for (size_t i = 0; i < excluded_ids.size(); ++i) {
    args.excluded_ids[i] = excluded_ids[i];
  }
  put_row_ids(rows, given_ids, allowed, args);
  Results results = new_results(rows, args, wants_sampled);
  if (args.num_rows == 0) {
    return results;
  }
  const int64_t partial_bytes = num_vocab_chunks(num_ids) * args.num_rows * static_cast<int64_t>(sizeof(VocabPartial));
  const int64_t filter_rows = args.sampling.top_k == nullptr ? 0 : kFilterRows;
  Tensor partials = torch::stable::new_empty(rows, {partial_bytes}, ScalarType::Byte);
  Tensor filter_logits = torch::stable::new_empty(rows, {filter_rows, num_ids}, ScalarType::Float);
  args.partials = static_cast<VocabPartial*>(partials.mutable_data_ptr());
  args.filter_logits = filter_rows == 0 ? nullptr : filter_logits.mutable_data_ptr<float>();
  DLLM_KERNEL(vocab_stats).launch(rows, args);
  return results;
}

}  // namespace dllm

DLLM_OP(vocab_stats,
        "(Tensor rows, Tensor? weight, int first_id, int[] excluded_ids, int num_candidates, bool wants_sampled, "
        "Tensor? keys, Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? given_ids, Tensor? allowed) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
