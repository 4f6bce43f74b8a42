#include <algorithm>

#include "rows.h"

// One update of one parameter; see reference.py. first and second are 1 - beta1 and 1 - beta2.
extern "C" void adamw(float* params, const float* grads, float* exp_avgs, float* exp_avg_sqs, int64_t size,
                      float grad_scale, float decay, float first, float beta2, float second, float step_size,
                      float root_correction, float eps, int64_t threads) {
  constexpr int64_t BLOCK = 4096;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t start = 0; start < size; start += BLOCK) {
    float *param = params + start, *exp_avg = exp_avgs + start, *exp_avg_sq = exp_avg_sqs + start;
    const float* grad = grads + start;
    const int64_t count = std::min(BLOCK, size - start);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float g = grad[i] * grad_scale;
      const float m = exp_avg[i] + first * (g - exp_avg[i]);
      const float v = exp_avg_sq[i] * beta2 + second * g * g;
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      param[i] = param[i] * decay - step_size * m / (std::sqrt(v) * root_correction + eps);
    }
  }
}
