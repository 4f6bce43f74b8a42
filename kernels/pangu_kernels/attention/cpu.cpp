#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

#include "rows.h"

// Flash attention (Dao 2023) on tiles of TILE keys by TILE queries. Scores lie keys by queries, so that softmax goes
// down columns, a vector of queries at a time. A document's key-value head is one thread's work, in a fixed order.
namespace {

typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int64_t WIDTH = sizeof(Vector) / sizeof(float);
constexpr int64_t TILE = 96;  // a multiple of the six rows and two vectors of a block

// Rows of a head: row t starts at data + t * stride.
struct Rows {
  float* data;
  int64_t stride;
  float* operator[](int64_t row) const { return data + row * stride; }
};

struct Matrix {
  const float* data;
  int64_t row, column;  // strides
};

int64_t round_up(int64_t columns) { return (columns + 2 * WIDTH - 1) / (2 * WIDTH) * (2 * WIDTH); }

// c [ROWS, 2 * WIDTH] = or += a [ROWS, depth] b [depth, 2 * WIDTH], all of c in registers.
template <int ROWS>
void multiply_block(Matrix a, Rows b, Rows c, int64_t depth, bool accumulate) {
  Vector sums[ROWS][2];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
    for (int half = 0; half < 2; ++half)
      sums[r][half] = accumulate ? *(const Vector*)(c[r] + half * WIDTH) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector low = *(const Vector*)b[k], high = *(const Vector*)(b[k] + WIDTH);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const float factor = a.data[r * a.row + k * a.column];
      sums[r][0] += factor * low;
      sums[r][1] += factor * high;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
    for (int half = 0; half < 2; ++half) *(Vector*)(c[r] + half * WIDTH) = sums[r][half];
}

// What of a product the causal mask leaves for six rows: of the depth what is not zero, of the columns what is wanted.
struct Part {
  int64_t first_column, first, end;
};

// c [rows, columns] = or += a [rows, depth] b [depth, columns], columns a multiple of 2 * WIDTH; part(row) is the Part
// for the six rows from `row` on.
template <typename Select>
void multiply(Matrix a, Rows b, Rows c, int64_t rows, int64_t columns, bool accumulate, const Select& part) {
  constexpr auto block = multiply_block<6>;
  constexpr decltype(block) rest[] = {nullptr,           multiply_block<1>, multiply_block<2>,
                                      multiply_block<3>, multiply_block<4>, multiply_block<5>};
  for (int64_t column = 0; column < columns; column += 2 * WIDTH)
    for (int64_t r = 0; r < rows; r += 6) {
      const Part p = part(r);
      if (column + 2 * WIDTH > p.first_column)
        (rows - r < 6 ? rest[rows - r] : block)({a.data + r * a.row + p.first * a.column, a.row, a.column},
                                                {b[p.first] + column, b.stride}, {c[r] + column, c.stride},
                                                p.end - p.first, accumulate);
    }
}

// Rows as columns, with zeros up to TILE of them.
void transpose(Rows from, int64_t count, int64_t size, float* to) {
  std::fill_n(to, size * TILE, 0.0f);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = 0; i < size; ++i) to[i * TILE + t] = from[t][i];
}

void copy_rows(Rows from, int64_t count, int64_t size, float* to) {
  for (int64_t t = 0; t < count; ++t) std::copy_n(from[t], size, to + t * size);
}

// Scratch memory, handed out in pieces.
class Memory {
 public:
  explicit Memory(int64_t size) : memory_(new float[size]), next_(memory_.get()) {}
  float* take(int64_t size) { return std::exchange(next_, next_ + size); }

 private:
  std::unique_ptr<float[]> memory_;
  float* next_;
};

struct Document {
  int64_t q_start, q_length, k_start, k_length;
  bool causal;

  // Calls work(first query, queries) for every tile of queries.
  template <typename Work>
  void for_queries(const Work& work) const {
    for (int64_t query = 0; query < q_length; query += TILE) work(query, std::min(TILE, q_length - query));
  }

  // Calls work(first key, keys, hidden) for every tile of keys that some of these queries see. Key k of the tile is
  // hidden from the queries before hidden + k.
  template <typename Work>
  void for_keys(int64_t query, int64_t queries, const Work& work) const {
    const int64_t earlier = k_length - q_length + query;  // keys before the one where the first query stands
    const int64_t seen = causal ? earlier + queries : k_length;
    for (int64_t key = 0; key < seen; key += TILE)
      work(key, std::min(TILE, seen - key), causal ? key - earlier : -k_length);
  }
};

// Calls work(document, key-value head) for every one of both.
template <typename Work>
void for_documents(const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, int64_t documents, int64_t key_heads,
                   bool causal, int64_t threads, const Work& work) {
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < documents; ++n)
    for (int64_t head = 0; head < key_heads; ++head) {
      const int64_t q = cu_seqlens_q[n], k = cu_seqlens_k[n];
      work(Document{q, cu_seqlens_q[n + 1] - q, k, cu_seqlens_k[n + 1] - k, causal}, head);
    }
}

int64_t first_visible(int64_t hidden, int64_t key, int64_t columns) {
  return std::clamp<int64_t>(hidden + key, 0, columns);
}

int64_t visible_keys(int64_t hidden, int64_t query, int64_t keys) {
  return std::clamp<int64_t>(query + 1 - hidden, 0, keys);
}

// One more tile of scores [keys, TILE] becomes exp(scale * score - maximum), after which what was summed up before has
// to be multiplied by `rescale`.
void add_to_softmax(float* scores, int64_t keys, int64_t columns, int64_t hidden, float scale, float* maximum,
                    float* total, float* rescale) {
  float before[TILE];
  std::copy_n(maximum, columns, before);
  for (int64_t k = 0; k < keys; ++k) {
    float* row = scores + k * TILE;
#pragma omp simd
    for (int64_t c = first_visible(hidden, k, columns); c < columns; ++c) {
      row[c] *= scale;
      maximum[c] = row[c] > maximum[c] ? row[c] : maximum[c];
    }
  }
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) {
    rescale[c] = pangu::fast_exp(before[c] - maximum[c]);
    total[c] *= rescale[c];
  }
  for (int64_t k = 0; k < keys; ++k) {
    float* row = scores + k * TILE;
    const int64_t first = first_visible(hidden, k, columns);
    std::fill_n(row, first, 0.0f);
#pragma omp simd
    for (int64_t c = first; c < columns; ++c) {
      row[c] = pangu::fast_exp(row[c] - maximum[c]);
      total[c] += row[c];
    }
  }
}

// From scores and d_probabilities, both [keys, TILE], in place: the probabilities and d_scores.
void softmax_backward(float* scores, float* d_scores, int64_t keys, int64_t columns, int64_t hidden, float scale,
                      const float* logsumexp, const float* projection) {
  for (int64_t k = 0; k < keys; ++k) {
    float *row = scores + k * TILE, *d_row = d_scores + k * TILE;
    const int64_t first = first_visible(hidden, k, columns);
    std::fill_n(row, first, 0.0f);
    std::fill_n(d_row, first, 0.0f);
#pragma omp simd
    for (int64_t c = first; c < columns; ++c) {
      row[c] = pangu::fast_exp(row[c] * scale - logsumexp[c]);
      d_row[c] = row[c] * (d_row[c] - projection[c]) * scale;
    }
  }
}

}  // namespace

// q and out [tokens, heads, size], k and v [keys, key_heads, size] with any stride between tokens, logsumexp
// [tokens, heads]; size a multiple of 2 * WIDTH.
extern "C" void attention(float* q, float* k, float* v, const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k,
                          float* out, float* logsumexp, int64_t q_stride, int64_t k_stride, int64_t v_stride,
                          int64_t documents, int64_t heads, int64_t key_heads, int64_t size, float scale,
                          int64_t causal, int64_t threads) {
  const int64_t group = heads / key_heads;
  for_documents(cu_seqlens_q, cu_seqlens_k, documents, key_heads, causal, threads, [&](Document document, int64_t kv) {
    Memory memory(2 * document.k_length * size + 2 * TILE * size + TILE * TILE);
    float *keys = memory.take(document.k_length * size), *values = memory.take(document.k_length * size);
    float *columns = memory.take(TILE * size), *sums = memory.take(TILE * size);
    float* scores = memory.take(TILE * TILE);
    copy_rows({k + document.k_start * k_stride + kv * size, k_stride}, document.k_length, size, keys);
    copy_rows({v + document.k_start * v_stride + kv * size, v_stride}, document.k_length, size, values);
    for (int64_t head = kv * group; head < (kv + 1) * group; ++head)
      document.for_queries([&](int64_t query, int64_t count) {
        const int64_t token = document.q_start + query, width = round_up(count);
        float maximum[TILE], total[TILE], rescale[TILE];
        std::fill_n(maximum, TILE, -std::numeric_limits<float>::infinity());
        std::fill_n(total, TILE, 0.0f);
        std::fill_n(sums, TILE * size, 0.0f);
        transpose({q + token * q_stride + head * size, q_stride}, count, size, columns);
        document.for_keys(query, count, [&](int64_t key, int64_t length, int64_t hidden) {
          multiply({keys + key * size, size, 1}, {columns, TILE}, {scores, TILE}, length, width, false,
                   [=](int64_t k) { return Part{first_visible(hidden, k, count), 0, size}; });
          add_to_softmax(scores, length, count, hidden, scale, maximum, total, rescale);
          for (int64_t t = 0; t < count; ++t)
            for (int64_t i = 0; i < size; ++i) sums[t * size + i] *= rescale[t];
          multiply({scores, 1, TILE}, {values + key * size, size}, {sums, size}, count, size, true,
                   [=](int64_t t) { return Part{0, 0, visible_keys(hidden, t + 5, length)}; });
        });
        for (int64_t t = 0; t < count; ++t) {
          const int64_t at = (token + t) * heads + head;
          const float factor = total[t] == 0 ? 0.0f : 1.0f / total[t];
          for (int64_t i = 0; i < size; ++i) out[at * size + i] = sums[t * size + i] * factor;
          logsumexp[at] = maximum[t] + std::log(total[t]);
        }
      });
  });
}

// As above; d_out, out, d_q, d_k and d_v end to end.
extern "C" void attention_backward(float* d_out, float* q, float* k, float* v, const float* out,
                                   const float* logsumexp, const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k,
                                   float* d_q, float* d_k, float* d_v, int64_t q_stride, int64_t k_stride,
                                   int64_t v_stride, int64_t documents, int64_t heads, int64_t key_heads, int64_t size,
                                   float scale, int64_t causal, int64_t threads) {
  const int64_t group = heads / key_heads;
  for_documents(cu_seqlens_q, cu_seqlens_k, documents, key_heads, causal, threads, [&](Document document, int64_t kv) {
    const int64_t all = document.k_length * size, tile = TILE * size;
    Memory memory(4 * all + 5 * tile + 2 * TILE * TILE);
    float *keys = memory.take(all), *values = memory.take(all), *d_keys = memory.take(all), *d_values = memory.take(all);
    float *q_rows = memory.take(tile), *q_columns = memory.take(tile), *d_queries = memory.take(tile);
    float *d_out_rows = memory.take(tile), *d_out_columns = memory.take(tile);
    float *scores = memory.take(TILE * TILE), *d_scores = memory.take(TILE * TILE);
    copy_rows({k + document.k_start * k_stride + kv * size, k_stride}, document.k_length, size, keys);
    copy_rows({v + document.k_start * v_stride + kv * size, v_stride}, document.k_length, size, values);
    std::fill_n(d_keys, all, 0.0f);
    std::fill_n(d_values, all, 0.0f);
    for (int64_t head = kv * group; head < (kv + 1) * group; ++head)
      document.for_queries([&](int64_t query, int64_t count) {
        const int64_t first = (document.q_start + query) * heads + head, width = round_up(count);
        float maximum[TILE], projection[TILE];
        copy_rows({q + (document.q_start + query) * q_stride + head * size, q_stride}, count, size, q_rows);
        copy_rows({d_out + first * size, heads * size}, count, size, d_out_rows);
        transpose({q_rows, size}, count, size, q_columns);
        transpose({d_out_rows, size}, count, size, d_out_columns);
        for (int64_t t = 0; t < count; ++t) {
          maximum[t] = logsumexp[first + t * heads];
          projection[t] = pangu::dot(d_out_rows + t * size, out + (first + t * heads) * size, size);
        }
        std::fill_n(d_queries, tile, 0.0f);
        document.for_keys(query, count, [&](int64_t key, int64_t length, int64_t hidden) {
          const int64_t at = key * size;
          const auto seen = [=](int64_t k) { return Part{first_visible(hidden, k, count), 0, size}; };
          multiply({keys + at, size, 1}, {q_columns, TILE}, {scores, TILE}, length, width, false, seen);
          multiply({values + at, size, 1}, {d_out_columns, TILE}, {d_scores, TILE}, length, width, false, seen);
          softmax_backward(scores, d_scores, length, count, hidden, scale, maximum, projection);
          const auto from_queries = [=](int64_t k) { return Part{0, first_visible(hidden, k, count), count}; };
          multiply({scores, TILE, 1}, {d_out_rows, size}, {d_values + at, size}, length, size, true, from_queries);
          multiply({d_scores, TILE, 1}, {q_rows, size}, {d_keys + at, size}, length, size, true, from_queries);
          multiply({d_scores, 1, TILE}, {keys + at, size}, {d_queries, size}, count, size, true,
                   [=](int64_t t) { return Part{0, 0, visible_keys(hidden, t + 5, length)}; });
        });
        for (int64_t t = 0; t < count; ++t) std::copy_n(d_queries + t * size, size, d_q + (first + t * heads) * size);
      });
    for (int64_t t = 0; t < document.k_length; ++t) {
      const int64_t to = ((document.k_start + t) * key_heads + kv) * size;
      std::copy_n(d_keys + t * size, size, d_k + to);
      std::copy_n(d_values + t * size, size, d_v + to);
    }
  });
}
