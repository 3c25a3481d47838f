// CreditDecoding: what a position makes of the credit that it gave to tokens, as vllm_dllm/unmask/credit.py states it.
#pragma once

#include <cmath>

#include "dllm/macros.h"
#include "dllm/vocab_partial.h"

namespace dllm {

constexpr int64_t kMaxCredited = kMaxGiven;  // tokens of a position

struct CreditRules {
  double alpha;
  double beta;
  double gamma;
};

// A row, and what was asked of it.
struct CreditRow {
  const int64_t* asked_ids;   // [kMaxCredited], -1: none
  const float* asked_logits;  // [kMaxCredited]
  const int64_t* top_ids;     // [num_candidates]
  const float* top_logits;    // [num_candidates]
  int64_t num_candidates;
  double rest;        // of the model's own distribution
  double drawn_rest;  // of that which the confidence is of
  double divisor;     // of its logits
  int64_t token_id;   // drawn without credit
  float token_logit;
  double temperature;  // 0 draws nothing
  uint64_t key;        // of the noise, unset at temperature 0
};

struct CreditedToken {
  int64_t id;
  double confidence;
};

// Whether the row has the logit of an id, and which.
DLLM_HOST_DEVICE inline bool find_logit(const CreditRow& row, int64_t id, double& logit) {
  for (int64_t i = 0; i < kMaxCredited; ++i) {
    if (row.asked_ids[i] == id) {
      logit = static_cast<double>(row.asked_logits[i]);
      return true;
    }
  }
  for (int64_t i = 0; i < row.num_candidates; ++i) {
    if (row.top_ids[i] == id) {
      logit = static_cast<double>(row.top_logits[i]);
      return true;
    }
  }
  return false;
}

// Whether the row has the logits of all ids that have credit.
DLLM_HOST_DEVICE inline bool knows_credited(const CreditRow& row, const int64_t* ids) {
  double unused = 0.0;
  for (int64_t i = 0; i < kMaxCredited; ++i) {
    if (ids[i] >= 0 && !find_logit(row, ids[i], unused)) {
      return false;
    }
  }
  return true;
}

// Let the credit of a position decay, and give the most probable token its.
DLLM_HOST_DEVICE inline void give_credit(const CreditRow& row, const CreditRules& rules, int64_t* ids,
                                         double* credits) {
  const int64_t best = row.top_ids[0];
  int64_t place = 0;
  double least = INFINITY;
  for (int64_t i = 0; i < kMaxCredited; ++i) {
    credits[i] *= rules.beta;
    // Its own place, else the first that is free, else that of the least credit.
    const double order = ids[i] == best ? -2.0 : ids[i] < 0 ? -1.0 : credits[i];
    if (order < least) {
      least = order;
      place = i;
    }
  }
  const double before = ids[place] == best ? credits[place] : 0.0;
  ids[place] = best;
  credits[place] = before + std::pow(1.0 / (1.0 + row.rest), rules.gamma);
}

DLLM_HOST_DEVICE inline double credit_score(const CreditRow& row, double logit, int64_t id) {
  return row.temperature > 0.0 ? logit + row.temperature * -std::log(-std::log(uniform(row.key, id))) : logit;
}

// Give credit, and draw of the logits that credit raises. What is drawn without credit has the best score of the ids
// that have none.
DLLM_HOST_DEVICE inline CreditedToken draw_credited(const CreditRow& row, const CreditRules& rules, int64_t* ids,
                                                    double* credits) {
  give_credit(row, rules, ids, credits);
  double top = -INFINITY;
  CreditedToken drawn = {row.token_id, 0.0};
  double drawn_raised = static_cast<double>(row.token_logit);
  double drawn_score = credit_score(row, drawn_raised, row.token_id);
  for (int64_t i = 0; i < kMaxCredited; ++i) {
    double logit = -INFINITY;
    if (ids[i] < 0 || !find_logit(row, ids[i], logit)) {
      continue;
    }
    const double raised = logit + rules.alpha * std::log1p(credits[i]);
    const double score = credit_score(row, raised, ids[i]);
    top = raised > top ? raised : top;
    if (score > drawn_score || (score == drawn_score && ids[i] < drawn.id)) {
      drawn.id = ids[i];
      drawn_raised = raised;
      drawn_score = score;
    }
  }
  // Relative to the largest raised logit, so that no exponential overflows.
  double mass = std::exp((static_cast<double>(row.top_logits[0]) - top) / row.divisor) * (1.0 + row.drawn_rest);
  for (int64_t i = 0; i < kMaxCredited; ++i) {
    double logit = -INFINITY;
    if (ids[i] >= 0 && find_logit(row, ids[i], logit)) {
      const double raised = logit + rules.alpha * std::log1p(credits[i]);
      mass += std::exp((raised - top) / row.divisor) - std::exp((logit - top) / row.divisor);
    }
  }
  drawn.confidence = std::exp((drawn_raised - top) / row.divisor) / mass;
  return drawn;
}

}  // namespace dllm
