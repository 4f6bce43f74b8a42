#include "rows.h"

// One update of one parameter; see reference.py. first and second are 1 - beta1 and 1 - beta2.
extern "C" void adamw(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t size, float grad_scale,
                      float decay, float first, float beta2, float second, float step_size, float root_correction,
                      float eps, int64_t threads) {
#pragma omp parallel for simd num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < size; ++i) {
    const float g = grad[i] * grad_scale;
    const float m = exp_avg[i] + first * (g - exp_avg[i]);
    const float v = exp_avg_sq[i] * beta2 + second * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = param[i] * decay - step_size * m / (std::sqrt(v) * root_correction + eps);
  }
}
