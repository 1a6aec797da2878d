// Tokens out of vLLM's packed blocks, of which every KV head has its own. The meaning is ops/packed.py::PackedCache.take;
// where a token's elements lie is given, so any layout of the blocks will do.

#include <cstdint>

namespace calidrop {

// The fields, their order and their types are those of library.py::TakeArguments. Strides in elements.
extern "C" struct TakeArguments {
  int64_t element_bytes, threads, kv_heads, tokens, head_dim, block_size;
  const int64_t *key_offsets, *value_offsets;  // [block_size, D], inside the (block, KV head) region
  const void* cache;
  int64_t block_stride, head_stride;
  const int32_t* blocks;  // the sequence's columns
  const int64_t* index;   // [kv_heads, tokens] positions
  void *keys, *values;    // [kv_heads, tokens, D]
};

namespace {

constexpr int64_t kTokensOfATask = 64;

template <class E>
void take_token(const E* region, const int64_t* offsets, int64_t head_dim, E* out) {
  for (int64_t d = 0; d < head_dim; d++) out[d] = region[offsets[d]];
}

// E: an integer as wide as an element.
template <class E>
void take(const TakeArguments& a) {
  const int64_t tasks = (a.tokens + kTokensOfATask - 1) / kTokensOfATask;
#pragma omp parallel for collapse(2) num_threads(int(a.threads)) if (a.threads > 1 && a.kv_heads * tasks > 1)
  for (int64_t head = 0; head < a.kv_heads; head++)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t first = task * kTokensOfATask, end = first + kTokensOfATask < a.tokens ? first + kTokensOfATask : a.tokens;
      for (int64_t t = head * a.tokens + first; t < head * a.tokens + end; t++) {
        const int64_t block = a.blocks[a.index[t] / a.block_size], row = a.index[t] % a.block_size * a.head_dim;
        const E* region = (const E*)a.cache + block * a.block_stride + head * a.head_stride;
        take_token(region, a.key_offsets + row, a.head_dim, (E*)a.keys + t * a.head_dim);
        take_token(region, a.value_offsets + row, a.head_dim, (E*)a.values + t * a.head_dim);
      }
    }
}

}  // namespace
}  // namespace calidrop

extern "C" int64_t calidrop_take_arguments_bytes() { return sizeof(calidrop::TakeArguments); }

// 0, or -1 for an element of another size.
extern "C" int calidrop_take(const calidrop::TakeArguments* arguments) {
  switch (arguments->element_bytes) {
    case 2: return calidrop::take<uint16_t>(*arguments), 0;
    case 4: return calidrop::take<uint32_t>(*arguments), 0;
    default: return -1;
  }
}
