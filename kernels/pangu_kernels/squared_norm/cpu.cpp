#include <algorithm>
#include <numeric>
#include <vector>

#include "rows.h"

extern "C" double squared_norm(const float* x, int64_t size, int64_t threads) {
  constexpr int64_t BLOCK = 4096;
  std::vector<double> sums((size + BLOCK - 1) / BLOCK);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t start = 0; start < size; start += BLOCK)
    sums[start / BLOCK] = pangu::dot(x + start, x + start, std::min(BLOCK, size - start));
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}
