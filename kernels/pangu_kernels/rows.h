// What the CPU kernels share: loops over one row, which stays in the L1 cache between passes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pangu {

// exp by 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes), within 2 ulp; branch-free, so that loops vectorize.
inline float fast_exp(float x) {
  x = x < -87.33f ? -87.33f : x > 88.02f ? 88.02f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  return p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

inline float dot(const float* a, const float* b, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

inline float inverse_root_mean_square(const float* x, int64_t size, float eps) {
  return 1.0f / std::sqrt(dot(x, x, size) / size + eps);
}

// d_x = rstd * weight * d_y - x * rstd^3 * mean(weight * d_y * x) [+ added], and d_weight += d_y * x * rstd.
inline void rms_norm_backward_row(const float* d_y, const float* x, const float* weight, float rstd,
                                  const float* added, float* d_x, float* d_weight, int64_t size) {
  float projection = 0;
#pragma omp simd reduction(+ : projection)
  for (int64_t i = 0; i < size; ++i) projection += d_y[i] * weight[i] * x[i];
  projection *= rstd * rstd * rstd / size;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float scaled = d_y[i] * rstd;
    d_weight[i] += scaled * x[i];
    d_x[i] = scaled * weight[i] - x[i] * projection + (added ? added[i] : 0.0f);
  }
}

}  // namespace pangu
