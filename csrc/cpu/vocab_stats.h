// What vocab_stats' entry and its instruction sets share.
#pragma once

#include "dllm/vocab_stats.h"
#include "isa.h"

namespace dllm::cpu {

constexpr int64_t kMaxWorkRows = 192;  // a weight tile in the L2 cache meets so many rows before the next one comes
constexpr int64_t kRowPadding = 16;    // the widest vector: rows of a work are padded to it

// The LM head's product of some rows: their statistics, or their logits.
struct VocabWork {
  const VocabStatsArgs& args;
  const int64_t* rows;  // [num_rows], ascending
  int64_t num_rows;     // 1 to kMaxWorkRows
  float* panels;        // scratch, hidden_size * num_rows rounded up to kRowPadding
  float* logits;        // [num_rows, num_ids] to fill; nullptr: fill args.partials
};

// Is the row's token drawn among the ids that a filter keeps?
static inline bool is_filtered(const VocabSampling& sampling, int64_t row) {
  return sampling.top_k != nullptr && sampling.temperature[row] > 0 &&
         (sampling.top_k[row] > 0 || sampling.top_p[row] < 1);
}

// `dllm::vocab_score`, compiled for every machine alike.
double exact_score(float logit, double temperature, uint64_t key, int64_t id);

}  // namespace dllm::cpu

DLLM_DECLARE(vocab_work, ::dllm::cpu::VocabWork)
