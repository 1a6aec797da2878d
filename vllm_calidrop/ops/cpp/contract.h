// What the operators are called with: ops/contract.py's tables as pointers, int32 as there, everything by state slot. The
// fields, their order and their types are those of the ctypes structures of library.py.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace calidrop {

// One rank's share of the model. dtype: attend.h::DType; layouts: attend.h::KeyLayout, ValueLayout.
struct Model {
  int64_t dtype, key_layout, value_layout, threads;
  int64_t kv_heads, group, head_dim, block_size;
};

struct Rows {
  int64_t count;
  const int32_t *slot, *token, *end, *table;
  int64_t table_stride;
};

struct Sequences {
  const int32_t *start, *stored;
  const float *theta1, *theta2;
  const int32_t *gate, *swap_blocks;
  int64_t swap_stride;
  const int32_t *codec, *most_reads;
  const CodecLayout* layouts;
};

// How a sequence recalls pages, by slot.
struct RecallSettings {
  const int32_t* stored;
  const float *theta, *eps, *top_p;
  const int32_t *most, *buffer_size, *rest, *sketch_blocks;
  int64_t sketch_stride;
  const int32_t* buffer_ids;
  int64_t buffer_stride;
};

// One layer's part of everything that stays where it is.
struct Layer {
  // The swap pool: [blocks, kv_heads] blocks of block_bytes; of codec none they are [pages, 2, 16, D].
  const uint8_t* pool;
  int64_t block_bytes;
  // The state table: [slots, kv_heads, group(, D)]; counts by slots of counts_stride.
  void* state_query;
  float *state_out, *state_lse;
  int64_t* counts;
  int64_t counts_stride;
  // Recall by pages: the sketch (sketch.h), mu [slots, kv_heads, D], looked [slots], the page buffer [pages, kv_heads,
  // 2, 16, D], which pages it holds, and how new they are [pages, kv_heads]; coded values (rest.h), their mean and the
  // balance of the sketch, [slots, kv_heads, D].
  const uint8_t* codes;
  const uint16_t* scales;
  const float* mu;
  uint8_t* looked;
  void* buffer;
  int64_t *held, *rank;
  const uint8_t* value_codes;
  const uint16_t* value_scales;
  const float *value_mu, *balance;
};

// What is the same for all layers.
struct Shared {
  Model model;
  Sequences sequences;
  RecallSettings recall;
  const float* signs;  // of the rotation, [padded_dim]
  int64_t padded_dim;
  int64_t value_page_bytes;  // room for a page's coded values
  // Histogram of the similarities: per bound, above the last, and their sum in millionths.
  const float* similarity_bounds;
  int64_t* similarity;
  int64_t similarity_buckets;
};

// One call. query, out: [tokens, kv_heads, group, D] of the element type, tokens strides apart. cache: vLLM's, packed: a
// region of 2 * block_size * D elements per (block, KV head).
struct Step {
  Rows rows;
  const void* query;
  int64_t query_stride;
  void* out;
  int64_t out_stride;
  const void* cache;
  int64_t block_stride, head_stride;
  double scale;
};

}  // namespace calidrop
