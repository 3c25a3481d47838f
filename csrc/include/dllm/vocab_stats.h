// vocab_stats: what each row of logits says (best ids, sums for probability and entropy, a drawn token) without the
// logits of all rows ever existing together.
#pragma once

#include <cfloat>

#include "dllm/macros.h"
#include "dllm/types.h"

namespace dllm {

constexpr uint32_t kMaxExcluded = 8;
constexpr int64_t kMaxGiven = 8;
constexpr int64_t kVocabChunk = 1024;  // ids of a partial: enough for a core or a CTA, 3 % of the memory of its logits
constexpr int64_t kFilterRows = 8;     // rows whose logits exist at a time, of those that top_k or top_p filter

// Sums over some ids of a row, of x = 0 for the best of them and less for others.
struct VocabSums {
  double rest;      // sum of exp(x) over all ids but the best; -1 if there is none, so that 1 + rest is over all
  double weighted;  // sum of x * exp(x)
};

// What a row says of the ids of one chunk of the vocabulary (vocab_partial.h merges them). `largest` is top_logit[0].
struct VocabPartial {
  VocabSums model;                  // x = logit - largest; without ids, rest is 0
  VocabSums sampled;                // x = (logit - largest) / temperature, of kept ids; unset where nothing is wanted
  double score;                     // of token_id, -inf where there is none
  float token_logit;                // of token_id
  int32_t token_id;                 // the id of the best score, the lowest of equal ones; -1: none
  float top_logit[kMaxCandidates];  // best first, the lowest id first of equal ones; -inf where there is none
  int32_t top_id[kMaxCandidates];   // -1 where there is none
};

// How the rows draw; ids score `logit + temperature * gumbel`, in float64, with gumbel = -log(-log(uniform(key, id))).
struct VocabSampling {
  const int64_t* keys;        // [num_rows] of noise.stream_keys; nullptr: no row draws, all take their best id
  const double* temperature;  // [num_rows], 0 takes the best id, whose score is its logit
  const int64_t* top_k;       // [num_rows], 0 keeps all; nullptr: no row is filtered
  const double* top_p;        // [num_rows], 1 keeps all; nullptr with top_k
};

// Row i has the logits `<rows[i], weight[v]>` of the ids first_id + v for v < num_ids, in float32 without a rounding to
// `type`; without a weight, `rows[i, v]` as they are. Those of ids that are excluded or not allowed are -inf. Of each
// row:
//   top_ids, top_logits: the num_candidates largest logits above -inf, best first, the lowest id first of equal ones;
//     places that are left over have id -1 and -inf.
//   rest, weighted: the VocabSums of x = logit - top_logits[0]. An exponential of a logit of -inf is 0, and so is its
//     term of `weighted`.
//   sampled_rest, sampled_weighted: at a temperature above 0 those of x = (logit - top_logits[0]) / temperature, over
//     the ids that top_k and top_p keep; at 0 again rest and weighted.
//   token_ids, token_logits, scores: the id of the best score among those that top_k and top_p keep. top_k keeps each
//     logit that is at least the k-th largest; top_p, of these, the smallest set of largest logits, the lowest id first
//     of equal ones, whose tempered probability reaches top_p, and at least one id. Filters need the whole vocabulary.
//   given_logits: those of the given ids, in the bits that all else is made of; -inf where an id is not among these.
// A NaN is no candidate and never drawn; it makes all sums NaN. A row without a logit above -inf takes
// first_id, with logit and score -inf.
// Sums are made by chunks of kVocabChunk ids, and chunks merged in ascending order, whatever the threads and rows.
struct VocabStatsArgs {
  FloatType type;      // of rows and weight
  const void* rows;    // [num_rows, hidden_size], without a weight [num_rows, num_ids]; ids or depth contiguous
  const void* weight;  // [num_ids, hidden_size], the depth contiguous; nullptr: rows are logits
  int64_t row_stride;
  int64_t weight_stride;
  int64_t num_rows;
  int64_t num_ids;
  int64_t hidden_size;  // 0 without a weight
  int64_t first_id;     // first_id + num_ids < 2^31
  int64_t excluded_ids[kMaxExcluded];
  int32_t num_excluded;
  int32_t num_candidates;  // 1 to kMaxCandidates
  VocabSampling sampling;
  const int64_t* given_ids;  // [num_rows, num_given], such as -1 for none; nullptr with num_given 0
  const int32_t* allowed;    // [num_rows, num_words], bit id % 32 of word id / 32; nullptr allows all
  int64_t num_given;         // 0 to kMaxGiven
  int64_t num_words;         // enough for id first_id + num_ids - 1
  int64_t* top_ids;          // [num_rows, num_candidates], as all results contiguous
  float* top_logits;         // [num_rows, num_candidates]
  double* rest;              // [num_rows]
  double* weighted;          // [num_rows]
  int64_t* token_ids;        // [num_rows]
  float* token_logits;       // [num_rows]
  double* scores;            // [num_rows]
  double* sampled_rest;      // [num_rows]; nullptr: not wanted
  double* sampled_weighted;  // [num_rows]; nullptr with sampled_rest
  float* given_logits;       // [num_rows, num_given]
  VocabPartial* partials;    // [num_chunks, num_rows] of scratch, num_chunks = ceil(num_ids / kVocabChunk)
  float* filter_logits;      // [kFilterRows, num_ids] of scratch; nullptr when no row is filtered
};

// The temperature of the sampled sums of a row; 0: they are not wanted, or those of the model.
DLLM_HOST_DEVICE inline double sampled_temperature(const VocabStatsArgs& args, int64_t row) {
  return args.sampled_rest == nullptr || args.sampling.keys == nullptr ? 0.0 : args.sampling.temperature[row];
}

// Whether the row may take an id, which may still be one of the excluded.
DLLM_HOST_DEVICE inline bool is_allowed(const VocabStatsArgs& args, int64_t row, int64_t id) {
  return args.allowed == nullptr || (args.allowed[row * args.num_words + id / 32] >> (id % 32) & 1) != 0;
}

// A number over the temperature as a factor that leaves 0 and -inf as they are, however small or large the temperature.
DLLM_HOST_DEVICE inline float over_temperature(double number, double temperature) {
  const double factor = number / temperature;
  return static_cast<float>(factor > FLT_MAX ? FLT_MAX : factor < FLT_MIN ? FLT_MIN : factor);
}

DLLM_HOST_DEVICE inline int64_t num_vocab_chunks(int64_t num_ids) { return (num_ids + kVocabChunk - 1) / kVocabChunk; }

namespace cpu {
void vocab_stats(const VocabStatsArgs& args);
}

namespace cuda {
const char* vocab_stats(const VocabStatsArgs& args, Stream stream);
}

}  // namespace dllm
