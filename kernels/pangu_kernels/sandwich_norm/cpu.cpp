#include "rows.h"

// Without post_weight, y is added as it is; without pre_weight there is no normed.
extern "C" void sandwich_norm(const float* residual, const float* y, const float* post_weight, const float* pre_weight,
                              float* new_residual, float* normed, float* post_rstd, float* pre_rstd, int64_t tokens,
                              int64_t size, float eps, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = t * size;
    float* sum = new_residual + at;
    if (post_weight) {
      const float rstd = post_rstd[t] = pangu::inverse_root_mean_square(y + at, size, eps);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) sum[i] = residual[at + i] + y[at + i] * rstd * post_weight[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) sum[i] = residual[at + i] + y[at + i];
    }
    if (pre_weight) {
      const float rstd = pre_rstd[t] = pangu::inverse_root_mean_square(sum, size, eps);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) normed[at + i] = sum[i] * rstd * pre_weight[i];
    }
  }
}

// d_post_weights and d_pre_weights [blocks, size] start at zero, as in rms_norm_backward. d_new_residual may be absent.
extern "C" void sandwich_norm_backward(const float* d_new_residual, const float* d_normed, const float* y,
                                       const float* new_residual, const float* post_weight, const float* pre_weight,
                                       const float* post_rstd, const float* pre_rstd, float* d_residual, float* d_y,
                                       float* d_post_weights, float* d_pre_weights, int64_t tokens, int64_t size,
                                       int64_t blocks, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t t = tokens * b / blocks; t < tokens * (b + 1) / blocks; ++t) {
      const int64_t at = t * size;
      const float* d_sum = d_new_residual ? d_new_residual + at : nullptr;
      if (pre_weight) {
        pangu::rms_norm_backward_row(d_normed + at, new_residual + at, pre_weight, pre_rstd[t], d_sum, d_residual + at,
                                     d_pre_weights + b * size, size);
        d_sum = d_residual + at;
      }
      if (post_weight) {
        pangu::rms_norm_backward_row(d_sum, y + at, post_weight, post_rstd[t], nullptr, d_y + at,
                                     d_post_weights + b * size, size);
      }
    }
  }
}
