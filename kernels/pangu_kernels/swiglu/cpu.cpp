#include "rows.h"

extern "C" void swiglu(const float* x, float* y, int64_t tokens, int64_t size, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tokens; ++t) {
    const float *gate = x + 2 * t * size, *up = gate + size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) y[t * size + i] = gate[i] * pangu::sigmoid(gate[i]) * up[i];
  }
}

extern "C" void swiglu_backward(const float* d_y, const float* x, float* d_x, int64_t tokens, int64_t size,
                                int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tokens; ++t) {
    const float *gate = x + 2 * t * size, *up = gate + size, *d = d_y + t * size;
    float *d_gate = d_x + 2 * t * size, *d_up = d_gate + size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float s = pangu::sigmoid(gate[i]);
      d_up[i] = d[i] * gate[i] * s;
      d_gate[i] = d[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
    }
  }
}
