// One look of one KV head on its own, for tests and benchmarks; a decode step does the same inside recall.h.

#include "rest.h"

namespace calidrop {

// The fields, their order and their types are those of look.py::_Arguments.
extern "C" struct LookArguments {
  int64_t heads, head_dim, padded_dim, tokens, bits, page_bytes, excluded_count;
  double scale, negligible;
  const float *query, *kept_lse, *signs;     // [heads, D], [heads], [padded_dim]
  const int32_t* blocks;                     // of the sequence
  const uint8_t* codes;                      // [blocks, kPagesPerBlock, padded_dim / 16, 16, 4]
  const uint16_t* scales;                    // [blocks, kPagesPerBlock, 16]
  const float *mu, *balance;                 // [D]
  const uint8_t* value_codes;                // [blocks, kPagesPerBlock, page_bytes]
  const uint16_t* value_scales;              // [blocks, kPagesPerBlock, 16]
  const float* value_mu;                     // [D]
  const int64_t* excluded;                   // [excluded_count]
  float *shares, *out, *lse;                 // [heads, pages], [heads, D], [heads]
};

// bits 0: the look alone. Always 0.
extern "C" int calidrop_look(const LookArguments* a) {
  static thread_local PageShares shares;
  static thread_local Rest rest;
  const Sketched sketch = {a->codes, a->scales, a->blocks, 1, 0, kPagesPerBlock, a->tokens,
                           int(a->padded_dim / kWordChannels), Levels::of_sizes(kInnerLevel, kOuterLevel),
                           a->balance, a->bits ? kErrorVariance : 0};
  const int heads = int(a->heads), head_dim = int(a->head_dim);
  shares.look(sketch, a->query, heads, head_dim, a->mu, a->signs, float(a->scale), a->kept_lse);
  for (int h = 0; h < heads && a->shares; h++)
    for (int64_t page = 0; page < shares.pages(); page++) a->shares[h * shares.pages() + page] = shares.of(h, page);
  if (!a->bits) return 0;
  const CodedValues values = {a->value_codes, a->value_scales, a->value_mu, a->page_bytes, int(a->bits)};
  rest.begin(shares);
  for (int64_t i = 0; i < a->excluded_count; i++) rest.exclude(a->excluded[i]);
  rest.attend(sketch, shares, values, float(a->negligible), a->signs, head_dim, a->out, a->lse);
  return 0;
}

extern "C" int64_t calidrop_look_arguments_bytes() { return sizeof(LookArguments); }

}  // namespace calidrop
