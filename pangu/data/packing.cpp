#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// A memory-mapped dataset of a token stream; its fields are those of `stream.StreamTable`.
struct Dataset {
  const char* tokens;
  int64_t token_bytes;    // 2 for uint16, 4 for int32, 0 for what is not read here
  int64_t num_tokens;
  int64_t end;            // of the dataset in its stream, in tokens
  const char* sequences;  // byte offset of each sequence, int64 at unaligned addresses
  const char* documents;  // first sequence of each document, likewise; null: a sequence is a document
  int64_t num_sequences;
  int64_t num_documents;
  int64_t vocab_size;  // token ids are checked against it; 0: not checked
};

struct Window {
  int64_t stream, start;
};

int64_t load(const char* array, int64_t index) {
  int64_t value;
  std::memcpy(&value, array + 8 * index, 8);
  return value;
}

int64_t document_start(const Dataset& dataset, int64_t document) {
  const int64_t sequence = dataset.documents ? load(dataset.documents, document) : document;
  if (sequence == dataset.num_sequences) return dataset.num_tokens;
  return load(dataset.sequences, sequence) / dataset.token_bytes;
}

// The first document that starts after `token`; num_documents if there is none.
int64_t document_after(const Dataset& dataset, int64_t token) {
  int64_t first = 0, count = dataset.num_documents;
  while (count > 0) {
    const int64_t half = count / 2;
    if (document_start(dataset, first + half) <= token) {
      first += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return first;
}

// `count` tokens as those from `offset` on of a window [length + 1], whose last one is only a label.
template <typename Token>
bool copy(const Dataset& dataset, int64_t first, int64_t count, int64_t offset, int64_t length,
          int64_t* __restrict__ tokens, int64_t* __restrict__ labels) {
  const Token* source = reinterpret_cast<const Token*>(dataset.tokens) + first;
  if (dataset.vocab_size && *std::max_element(source, source + count) >= dataset.vocab_size) return false;
  if (offset > 0) labels[offset - 1] = source[0];
  if (offset + count <= length) tokens[offset + count - 1] = source[count - 1];
  for (int64_t i = 0; i < count - 1; ++i) {
    tokens[offset + i] = source[i];
    labels[offset + i] = source[i + 1];
  }
  return true;
}

}  // namespace

// What `packing.pack` computes of `micro_batch_size` windows at a time. `batches` [number, 3, tokens] are tokens,
// labels and positions; `boundaries` follow one another, those of a batch up to its entry in `ends`. `rows`
// [streams + 1] are the first datasets of each stream. Returns 0 where a dataset is of another type, has a token id
// that is too large, or ends inside a window: the reference says which.
extern "C" int64_t pack(const Dataset* datasets, const int64_t* rows, const Window* windows, int64_t num_windows,
                        int64_t micro_batch_size, int64_t length, int64_t reset_at_documents, int64_t reset_positions,
                        int64_t ignored_label, int64_t* batches, int32_t* boundaries, int64_t* ends) {
  const int64_t num_tokens = micro_batch_size * length;
  int64_t num_boundaries = 0;
  for (int64_t index = 0; index < num_windows; ++index) {
    const auto [stream, window_start] = windows[index];
    const int64_t origin = index % micro_batch_size * length;
    int64_t* tokens = batches + index / micro_batch_size * 3 * num_tokens + origin;
    int64_t *labels = tokens + num_tokens, *positions = labels + num_tokens;
    int64_t counted = 0, last = 0;  // where positions are written up to, and the last start of a document
    const auto count_to = [&](int64_t end) {
      for (int64_t i = counted; i < end; ++i) positions[i] = i - counted;
      counted = end;
    };
    boundaries[num_boundaries++] = origin;
    const Dataset *dataset = datasets + rows[stream], *stream_end = datasets + rows[stream + 1];
    while (dataset < stream_end && dataset->end <= window_start) ++dataset;
    for (int64_t filled = 0; filled <= length; ++dataset) {
      if (dataset == stream_end) return 0;
      const int64_t first = window_start + filled - (dataset->end - dataset->num_tokens);
      const int64_t count = std::min(dataset->num_tokens - first, length + 1 - filled);
      if (count > 0) {
        const auto read = dataset->token_bytes == 2 ? copy<uint16_t> : copy<int32_t>;
        if (!dataset->token_bytes || !read(*dataset, first, count, filled, length, tokens, labels)) return 0;
        // The document at the head of a further dataset starts inside the window, one at the window's start does not.
        int64_t document = document_after(*dataset, filled ? first - 1 : first);
        for (; document < dataset->num_documents; ++document) {
          const int64_t start = document_start(*dataset, document) - first + filled;
          if (start >= filled + count) break;
          if (start == last) continue;  // an empty document
          last = start;
          if (reset_at_documents) labels[start - 1] = ignored_label;
          if (start == length) continue;  // it begins with the window's last label
          if (reset_at_documents) boundaries[num_boundaries++] = origin + start;
          if (reset_at_documents || reset_positions) count_to(start);
        }
      }
      filled += count;
    }
    count_to(length);
    if (origin + length == num_tokens) {
      boundaries[num_boundaries++] = num_tokens;
      *ends++ = num_boundaries;
    }
  }
  return 1;
}
