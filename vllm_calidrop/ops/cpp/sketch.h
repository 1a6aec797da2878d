// The sketch's side of a look: estimated logits of evicted tokens, and from them every page's share of the attention.
// One pass over the 2-bit codes as they lie; a level is looked up in a register. The meaning is recall/sketch.py's and
// recall/looks.py::page_shares'.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <vector>

#include "numbers.h"
#include "simd.h"

namespace calidrop {

constexpr int kPage = kPageTokens;
constexpr int kLookSums = kSums < 8 ? kSums : 8;  // pages times heads that are summed at once
static_assert(kPage == kLanes, "a page is a vector");

// The four levels by two bits (the lower: which size; the higher: the sign), for a vector of words of codes.
class Levels {
 public:
  Levels(float inner, float outer) : inner_(Part{} + inner), outer_(Part{} + outer) {
    for (int i = 0; i < kPartLanes; i++) table_[i] = (i & 2 ? 1 : -1) * (i & 1 ? outer : inner);
  }
  // The level that the lowest two bits name; the other bits may be anything.
  Part operator()(Part codes) const {
#if defined(__AVX512F__)
    return (Part)_mm512_permutevar_ps((__m512)table_, (__m512i)codes);
#elif defined(__AVX__)
    return (Part)_mm256_permutevar_ps((__m256)table_, (__m256i)codes);
#else
    const PartInts bits = (PartInts)codes;
    const Part size = (bits & 1) != 0 ? outer_ : inner_;
    return (bits & 2) != 0 ? size : -size;
#endif
  }
  template <class V>
  Pair<V> operator()(Pair<V> codes) const {
    return {(*this)(codes.lo), (*this)(codes.hi)};
  }

 private:
  Part inner_, outer_, table_;
};

// The codes of the next channel.
inline Part next_channel(Part codes) { return (Part)((PartWords)codes >> 2); }
template <class V>
inline Pair<V> next_channel(Pair<V> codes) {
  return {next_channel(codes.lo), next_channel(codes.hi)};
}

// Half-precision numbers that are not negative.
template <class V>
inline V load_scales(const uint16_t* from) {
  if constexpr (kIsPair<V>) {
    typedef decltype(V::lo) Half;
    return {load_scales<Half>(from), load_scales<Half>(from + sizeof(Half) / sizeof(float))};
  } else {
    return (Part)(__builtin_convertvector(load_as<PartHalfwords>(from), PartWords) << 13) * 0x1p112f;
  }
}

inline Part fold(Part v) { return v; }
template <class V>
inline Part fold(Pair<V> v) {
  return fold(v.lo + v.hi);
}

// Random signs, then Hadamard in Sylvester's order, not normalised: y [size] from x [dim].
inline void rotate(const float* x, int dim, const float* signs, int size, float* y) {
  for (int i = 0; i < size; i++) y[i] = i < dim ? x[i] * signs[i] : 0.0f;
  for (int step = 1; step < size; step *= 2)
    for (int i = 0; i < size; i += 2 * step)
      for (int j = i; j < i + step; j++) {
        const float a = y[j], b = y[j + step];
        y[j] = a + b, y[j + step] = a - b;
      }
}

// <query, code> of V pages for H heads. words: [V, num_words, kPage]; query: [16 * num_words, H].
template <int H, int V>
inline void page_dots(const uint32_t* words, int num_words, const float* query, const Levels& levels, Floats* out) {
  Floats sums[V][H] = {};
  for (int w = 0; w < num_words; w++) {
    Floats codes[V];
    for (int v = 0; v < V; v++) codes[v] = load_as<Floats>(words + (v * num_words + w) * kPage);
    for (int c = 0; c < kWordChannels; c++, query += H)
      for (int v = 0; v < V; v++) {
        const Floats level = levels(codes[v]);
        codes[v] = next_channel(codes[v]);
        for (int h = 0; h < H; h++) sums[v][h] += level * query[h];
      }
  }
  for (int v = 0; v < V; v++)
    for (int h = 0; h < H; h++) out[v * H + h] = sums[v][h];
}

// A KV head's sketched tokens, and the queries that look at them.
struct Sketched {
  const uint8_t* codes;    // of the layer: [blocks, KV heads, pages, num_words, kPage, 4]
  const uint16_t* scales;  // [blocks, KV heads, pages, kPage]
  const int32_t* blocks;   // of the sequence
  int64_t kv_heads, kv_head, pages_per_block, tokens;
  int num_words;
  Levels levels;
};

// Shares of all pages in the attention of `heads` queries; a thread keeps one and uses it again.
class PageShares {
 public:
  // query: [heads, D]; mu: [D]; signs: [16 * num_words]; kept_lse: [heads].
  void look(const Sketched& sketch, const float* query, int heads, int head_dim, const float* mu, const float* signs,
            float scale, const float* kept_lse) {
    heads_ = heads, pages_ = (sketch.tokens + kPage - 1) / kPage;
    const int64_t blocks = (pages_ + sketch.pages_per_block - 1) / sketch.pages_per_block;
    stride_ = std::max<int64_t>(blocks * sketch.pages_per_block, (pages_ + kPartLanes - 1) / kPartLanes * kPartLanes);
    logits_.resize(heads * stride_ * kPage);
    shares_.resize(heads * stride_);
    const int size = sketch.num_words * kWordChannels;
    rotated_.resize(size), turned_.resize(4 * size), base_.resize(heads);
    int h = 0;
    const auto turn = [&](int count) {
      for (int i = 0; i < count; i++) {
        const float* q = query + (h + i) * head_dim;
        rotate(q, head_dim, signs, size, rotated_.data());
        float along_mu = 0;
        for (int d = 0; d < head_dim; d++) along_mu += q[d] * mu[d];
        base_[h + i] = along_mu * scale;
        for (int d = 0; d < size; d++) turned_[d * count + i] = rotated_[d] * (scale / std::sqrt(float(size)));
      }
    };
    for (; h + 4 <= heads; h += 4) turn(4), logits<4, kLookSums / 4>(sketch, h);
    for (; h + 2 <= heads; h += 2) turn(2), logits<2, kLookSums / 2>(sketch, h);
    for (; h < heads; h++) turn(1), logits<1, kLookSums>(sketch, h);
    for (h = 0; h < heads; h++) shares(h, kept_lse[h]);
  }

  int64_t pages() const { return pages_; }
  int heads() const { return heads_; }
  float of(int head, int64_t page) const { return shares_[head * stride_ + page]; }

 private:
  template <int H, int V>
  void logits(const Sketched& sketch, int first_head) {
    const int64_t page_words = int64_t(sketch.num_words) * kPage, per_block = sketch.pages_per_block;
    for (int64_t page = 0; page < pages_; page += V) {
      const int64_t at = (sketch.blocks[page / per_block] * sketch.kv_heads + sketch.kv_head) * per_block + page % per_block;
      Floats dots[V * H];
      page_dots<H, V>((const uint32_t*)sketch.codes + at * page_words, sketch.num_words, turned_.data(), sketch.levels,
                      dots);
      for (int v = 0; v < V; v++) {
        const int rest = int(std::clamp<int64_t>(sketch.tokens - (page + v) * kPage, 0, kPage));
        const Floats scales = load_scales<Floats>(sketch.scales + (at + v) * kPage);
        for (int h = 0; h < H; h++) {
          Floats found = dots[v * H + h] * scales + base_[first_head + h];
          if (rest < kPage) found = keep(found, 0, rest);
          store(logits_.data() + ((first_head + h) * stride_ + page + v) * kPage, found);
        }
      }
    }
  }

  // Each page's sum of exponentials, over that of everything, the kept tokens included. NaN where mu is: such a head's
  // KV must not be read (RecallStore.refuse).
  void shares(int head, float kept_lse) {
    float *logits = logits_.data() + head * stride_ * kPage, *shares = shares_.data() + head * stride_;
    if (base_[head] != base_[head]) return (void)std::fill_n(shares, pages_, base_[head]);
    Floats tops = broadcast(kept_lse);
    for (int64_t page = 0; page < pages_; page++) tops = max(tops, load(logits + page * kPage));
    const float top = maximum(tops);
    float total = std::exp(kept_lse - top);
    for (int64_t page = 0; page < pages_; page += kPartLanes) {
      Part each[kPartLanes];
      for (int i = 0; i < kPartLanes; i++)
        each[i] = page + i < pages_ ? fold(exp_nonpositive(load(logits + (page + i) * kPage) - broadcast(top))) : Part{};
      const Part sums = sums_of(each);
      std::memcpy(shares + page, &sums, sizeof(sums));
      total += sum(sums);
    }
    const float share = 1.0f / total;
    for (int64_t page = 0; page < pages_; page++) shares[page] *= share;
  }

  int heads_ = 0;
  int64_t pages_ = 0, stride_ = 0;
  std::vector<float> logits_, shares_, rotated_, turned_, base_;
};

}  // namespace calidrop
