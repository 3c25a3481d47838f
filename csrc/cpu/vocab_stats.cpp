#include "vocab_stats.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#include "dllm/vocab_partial.h"

namespace dllm::cpu {
namespace {

constexpr int kNumBuckets = 256;
constexpr double kBucketsPerNat = 8.0;

void run(const VocabWork& work) { DLLM_DISPATCH(vocab_work, work) }

void merge_row(const VocabStatsArgs& args, int64_t row) {
  VocabPartial total = empty_partial();
  const double temperature = sampled_temperature(args, row);
  for (int64_t chunk = 0; chunk < num_vocab_chunks(args.num_ids); ++chunk) {
    merge_partial(total, args.partials[chunk * args.num_rows + row], args.num_candidates, temperature);
  }
  put_partial(args, row, total);
}

// A filter keeps the ids down to a last one, in the order of logits descending, ids ascending.
struct Cut {
  float logit = -INFINITY;
  int64_t id = INT64_MAX;

  bool keeps(float other_logit, int64_t other_id) const {
    return other_logit > logit || (other_logit == logit && other_id <= id);
  }
};

Cut top_k_cut(const float* logits, int64_t num_ids, int64_t top_k) {
  if (top_k <= 0 || top_k >= num_ids) {
    return {};
  }
  std::vector<float> copy(logits, logits + num_ids);
  std::nth_element(copy.begin(), copy.begin() + (top_k - 1), copy.end(), std::greater<>());
  return {.logit = copy[top_k - 1]};
}

// Of what `cut` keeps, the smallest set of best ids whose tempered probability reaches top_p. Sums by distance from the
// largest logit tell near which distance the set ends; only the ids there are sorted.
Cut top_p_cut(const float* logits, int64_t num_ids, double temperature, double top_p, Cut cut) {
  const double largest = *std::max_element(logits, logits + num_ids);
  if (top_p >= 1.0 || !std::isfinite(largest)) {  // an infinite logit has no distance from others
    return cut;
  }
  const auto mass = [&](int64_t id) { return std::exp((logits[id] - largest) / temperature); };
  const auto bucket_of = [&](int64_t id) {
    return static_cast<int>(std::min((largest - logits[id]) / temperature * kBucketsPerNat, kNumBuckets - 1.0));
  };
  double sums[kNumBuckets] = {};
  for (int64_t id = 0; id < num_ids; ++id) {
    if (cut.keeps(logits[id], id)) {
      sums[bucket_of(id)] += mass(id);
    }
  }
  const double wanted = top_p * std::accumulate(sums, sums + kNumBuckets, 0.0);
  double before = 0.0;
  int last = 0;
  while (last < kNumBuckets - 1 && before + sums[last] < wanted) {
    before += sums[last++];
  }
  std::vector<int64_t> ids;
  for (int64_t id = 0; id < num_ids; ++id) {
    if (cut.keeps(logits[id], id) && bucket_of(id) == last) {
      ids.push_back(id);
    }
  }
  std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  for (const int64_t id : ids) {
    cut = {.logit = logits[id], .id = id};
    before += mass(id);
    if (before >= wanted) {
      break;
    }
  }
  return cut;
}

// The sampled sums, ids ascending.
VocabSums kept_sums(const float* logits, int64_t num_ids, double temperature, Cut cut) {
  const int64_t first = std::max_element(logits, logits + num_ids) - logits;
  VocabSums sums = {};
  for (int64_t id = 0; id < num_ids; ++id) {
    if (id != first && logits[id] > -INFINITY && cut.keeps(logits[id], id)) {
      const double x = (static_cast<double>(logits[id]) - logits[first]) / temperature;
      const double mass = std::exp(x);
      sums.rest += mass;
      sums.weighted += mass == 0.0 ? 0.0 : x * mass;
    }
  }
  return sums;
}

void draw_filtered(const VocabStatsArgs& args, int64_t row, float* logits) {
  const VocabSampling& sampling = args.sampling;
  const double temperature = sampling.temperature[row];
  std::replace_if(logits, logits + args.num_ids, [](float logit) { return std::isnan(logit); }, -INFINITY);
  const Cut top_k = top_k_cut(logits, args.num_ids, sampling.top_k[row]);
  const Cut cut = top_p_cut(logits, args.num_ids, temperature, sampling.top_p[row], top_k);
  VocabPartial drawn = empty_partial();
  for (int64_t id = 0; id < args.num_ids; ++id) {
    if (!cut.keeps(logits[id], id)) {
      continue;
    }
    const double score =
        vocab_score(logits[id], temperature, static_cast<uint64_t>(sampling.keys[row]), args.first_id + id);
    if (score > drawn.score) {
      drawn.score = score;
      drawn.token_logit = logits[id];
      drawn.token_id = static_cast<int32_t>(args.first_id + id);
    }
  }
  put_token(args, row, drawn);
  if (args.sampled_rest != nullptr) {
    const bool had_nan = std::isnan(args.rest[row]);
    put_sampled(args, row, had_nan ? VocabSums{NAN, NAN} : kept_sums(logits, args.num_ids, temperature, cut));
  }
}

}  // namespace

double exact_score(float logit, double temperature, uint64_t key, int64_t id) {
  return vocab_score(logit, temperature, key, id);
}

void vocab_stats(const VocabStatsArgs& args) {
  std::vector<int64_t> rows(args.num_rows);
  std::iota(rows.begin(), rows.end(), 0);
  std::fill_n(args.given_logits, args.num_rows * args.num_given, -INFINITY);
  const int64_t padded = (std::min(args.num_rows, kMaxWorkRows) + kRowPadding - 1) / kRowPadding * kRowPadding;
  const std::unique_ptr<float[]> panels(new float[args.hidden_size * padded]);
  for (int64_t first = 0; first < args.num_rows; first += kMaxWorkRows) {
    run({args, &rows[first], std::min(kMaxWorkRows, args.num_rows - first), panels.get(), nullptr});
  }
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < args.num_rows; ++row) {
    merge_row(args, row);
  }
  std::erase_if(rows, [&](int64_t row) { return !is_filtered(args.sampling, row); });
  const auto num_filtered = static_cast<int64_t>(rows.size());
  for (int64_t first = 0; first < num_filtered; first += kFilterRows) {
    const int64_t num_rows = std::min(kFilterRows, num_filtered - first);
    run({args, &rows[first], num_rows, panels.get(), args.filter_logits});
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < num_rows; ++i) {
      draw_filtered(args, rows[first + i], args.filter_logits + i * args.num_ids);
    }
  }
}

}  // namespace dllm::cpu
