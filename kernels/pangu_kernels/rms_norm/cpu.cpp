#include "rows.h"

extern "C" void rms_norm(const float* x, const float* weight, float* y, float* rstd, int64_t tokens, int64_t size,
                         float eps, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = x + t * size;
    rstd[t] = pangu::inverse_root_mean_square(row, size, eps);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) y[t * size + i] = row[i] * rstd[t] * weight[i];
  }
}

// d_weights [blocks, size] starts at zero: block b sums over its share of the tokens, whatever the number of threads.
extern "C" void rms_norm_backward(const float* d_y, const float* x, const float* weight, const float* rstd, float* d_x,
                                  float* d_weights, int64_t tokens, int64_t size, int64_t blocks, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t t = tokens * b / blocks; t < tokens * (b + 1) / blocks; ++t) {
      const int64_t at = t * size;
      pangu::rms_norm_backward_row(d_y + at, x + at, weight, rstd[t], nullptr, d_x + at, d_weights + b * size, size);
    }
  }
}
