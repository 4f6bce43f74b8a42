#include "rows.h"

// x is read by the strides of its tokens and heads. `transposed` turns the rotation around, as backward needs it.
extern "C" void rope(const float* x, const float* cos, const float* sin, float* y, int64_t tokens, int64_t heads,
                     int64_t head_dim, int64_t token_stride, int64_t head_stride, int64_t transposed, int64_t threads) {
  const int64_t half = head_dim / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tokens; ++t) {
    const float *cos1 = cos + t * head_dim, *cos2 = cos1 + half;
    const float *sin1 = sin + t * head_dim, *sin2 = sin1 + half;
    for (int64_t h = 0; h < heads; ++h) {
      const float *x1 = x + t * token_stride + h * head_stride, *x2 = x1 + half;
      float *y1 = y + (t * heads + h) * head_dim, *y2 = y1 + half;
      if (transposed) {
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          y1[i] = x1[i] * cos1[i] + x2[i] * sin2[i];
          y2[i] = x2[i] * cos2[i] - x1[i] * sin1[i];
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          y1[i] = x1[i] * cos1[i] - x2[i] * sin1[i];
          y2[i] = x2[i] * cos2[i] + x1[i] * sin2[i];
        }
      }
    }
  }
}
