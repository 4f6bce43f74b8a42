#include "rows.h"

// Losses of a chunk of tokens; with `gradients`, logits become d_logits in place. Label -100: loss and gradient 0.
extern "C" void softmax_cross_entropy(float* logits, const int64_t* labels, const float* token_weights, float* losses,
                                      int64_t tokens, int64_t vocab_size, int64_t gradients, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = logits + t * vocab_size;
    const int64_t label = labels[t];
    float maximum = row[0];
#pragma omp simd reduction(max : maximum)
    for (int64_t i = 0; i < vocab_size; ++i) maximum = row[i] > maximum ? row[i] : maximum;
    const float label_logit = label < 0 ? 0.0f : row[label];
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < vocab_size; ++i) {
      row[i] = pangu::fast_exp(row[i] - maximum);
      total += row[i];
    }
    losses[t] = label < 0 ? 0.0f : std::log(total) + maximum - label_logit;
    if (gradients) {
      const float scale = token_weights[t] / total;
#pragma omp simd
      for (int64_t i = 0; i < vocab_size; ++i) row[i] *= scale;
      if (label >= 0) row[label] -= token_weights[t];
    }
  }
}
