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

// What two bits of a code stand for, for a vector of words of codes.
class Levels {
 public:
  Levels(float zero, float one, float two, float three) {
    const float four[] = {zero, one, two, three};
    for (int i = 0; i < kPartLanes; i++) table_[i] = four[i % 4];
  }
  // The levels of keys, and of values of two bits: the lower bit says which size, the higher one the sign.
  static Levels of_sizes(float inner, float outer) { return {-inner, -outer, inner, outer}; }
  // The levels of values of one bit, whatever the next bit is.
  static Levels of_signs() { return {-1, 1, -1, 1}; }

  // The level that the lowest two bits name; the other bits may be anything.
  Part operator()(Part codes) const {
#if defined(__AVX512F__)
    return (Part)_mm512_permutevar_ps((__m512)table_, (__m512i)codes);
#elif defined(__AVX__)
    return (Part)_mm256_permutevar_ps((__m256)table_, (__m256i)codes);
#else
    const PartInts bits = (PartInts)codes;
    const Part without = (bits & 1) != 0 ? Part{} + table_[1] : Part{} + table_[0];
    const Part with = (bits & 1) != 0 ? Part{} + table_[3] : Part{} + table_[2];
    return (bits & 2) != 0 ? with : without;
#endif
  }
  template <class V>
  Pair<V> operator()(Pair<V> codes) const {
    return {(*this)(codes.lo), (*this)(codes.hi)};
  }

 private:
  Part table_;
};

// The codes that follow the lowest `bits` bits.
template <int bits>
inline Part next_codes(Part codes) {
  return (Part)((PartWords)codes >> bits);
}
template <int bits, class V>
inline Pair<V> next_codes(Pair<V> codes) {
  return {next_codes<bits>(codes.lo), next_codes<bits>(codes.hi)};
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

// The Hadamard transform in Sylvester's order, not normalised, in place.
inline void transform(float* y, int size) {
  for (int step = 1; step < size; step *= 2)
    for (int i = 0; i < size; i += 2 * step)
      for (int j = i; j < i + step; j++) {
        const float a = y[j], b = y[j + step];
        y[j] = a + b, y[j + step] = a - b;
      }
}

// Random signs, then the transform: y [size] from x [dim].
inline void rotate(const float* x, int dim, const float* signs, int size, float* y) {
  for (int i = 0; i < size; i++) y[i] = i < dim ? x[i] * signs[i] : 0.0f;
  transform(y, size);
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
        codes[v] = next_codes<2>(codes[v]);
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
  const float* balance = nullptr;  // weights of the channels that the keys were coded with, [D]; null: none
  // The variance of the error of a balanced query's dot product with the key, per |query|^2 and squared scale of the
  // token; half of it is subtracted from logits (evicted/recall/sketch.py::inflation).
  float error_variance = 0;

  // Where a page of the sequence lies, counted in pages of the layer.
  int64_t page_at(int64_t page) const {
    return (blocks[page / pages_per_block] * kv_heads + kv_head) * pages_per_block + page % pages_per_block;
  }
};

// Every token's weight and every page's share in the attention of `heads` queries, the kept tokens included; a thread keeps
// one and uses it again.
class PageShares {
 public:
  // query: [heads, D]; mu: [D]; signs: [16 * num_words]; kept_lse: [heads].
  void look(const Sketched& sketch, const float* query, int heads, int head_dim, const float* mu, const float* signs,
            float scale, const float* kept_lse) {
    heads_ = heads, pages_ = (sketch.tokens + kPage - 1) / kPage;
    const int64_t blocks = (pages_ + sketch.pages_per_block - 1) / sketch.pages_per_block;
    stride_ = std::max<int64_t>(blocks * sketch.pages_per_block, (pages_ + kPartLanes - 1) / kPartLanes * kPartLanes);
    weights_.resize(heads * stride_ * kPage);
    shares_.resize(heads * stride_);
    const int size = sketch.num_words * kWordChannels;
    rotated_.resize(size), turned_.resize(4 * size), balanced_.resize(head_dim);
    base_.resize(heads), inflation_.resize(heads), tops_.resize(heads), totals_.resize(heads);
    int h = 0;
    const auto turn = [&](int count) {
      for (int i = 0; i < count; i++) {
        const float* q = query + (h + i) * head_dim;
        float along_mu = 0, length = 0;
        for (int d = 0; d < head_dim; d++) {
          along_mu += q[d] * mu[d];
          balanced_[d] = sketch.balance ? q[d] / sketch.balance[d] : q[d];
          length += balanced_[d] * balanced_[d];
        }
        rotate(balanced_.data(), head_dim, signs, size, rotated_.data());
        base_[h + i] = along_mu * scale;
        inflation_[h + i] = 0.5f * scale * scale * length * sketch.error_variance;
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
  // exp(logit - top(head)) of a page's tokens; zero beyond the last one.
  const float* weights(int head, int64_t page) const { return weights_.data() + (head * stride_ + page) * kPage; }
  // The largest logit, and the sum of all weights relative to it: those of the kept tokens as well.
  float top(int head) const { return tops_[head]; }
  float total(int head) const { return totals_[head]; }

 private:
  template <int H, int V>
  void logits(const Sketched& sketch, int first_head) {
    const int64_t page_words = int64_t(sketch.num_words) * kPage;
    for (int64_t page = 0; page < pages_; page += V) {
      const int64_t at = sketch.page_at(page);
      Floats dots[V * H];
      page_dots<H, V>((const uint32_t*)sketch.codes + at * page_words, sketch.num_words, turned_.data(), sketch.levels,
                      dots);
      for (int v = 0; v < V; v++) {
        const int rest = int(std::clamp<int64_t>(sketch.tokens - (page + v) * kPage, 0, kPage));
        const Floats scales = load_scales<Floats>(sketch.scales + (at + v) * kPage);
        for (int h = 0; h < H; h++) {
          Floats found = dots[v * H + h] - scales * inflation_[first_head + h];
          found = found * scales + base_[first_head + h];
          if (rest < kPage) found = keep(found, 0, rest);
          store(weights_.data() + ((first_head + h) * stride_ + page + v) * kPage, found);
        }
      }
    }
  }

  // Logits become weights, and each page's sum of them, over that of everything, its share. NaN where mu is: such a head's
  // KV must not be read (RecallStore.refuse).
  void shares(int head, float kept_lse) {
    float *weights = weights_.data() + head * stride_ * kPage, *shares = shares_.data() + head * stride_;
    if (base_[head] != base_[head]) return (void)std::fill_n(shares, pages_, base_[head]);
    Floats tops = broadcast(kept_lse);
    for (int64_t page = 0; page < pages_; page++) tops = max(tops, load(weights + page * kPage));
    const float top = maximum(tops);
    float total = std::exp(kept_lse - top);
    for (int64_t page = 0; page < pages_; page += kPartLanes) {
      Part each[kPartLanes];
      for (int i = 0; i < kPartLanes; i++) {
        if (page + i >= pages_) {
          each[i] = Part{};
          continue;
        }
        const Floats of_page = exp_nonpositive(load(weights + (page + i) * kPage) - broadcast(top));
        store(weights + (page + i) * kPage, of_page);
        each[i] = fold(of_page);
      }
      const Part sums = sums_of(each);
      std::memcpy(shares + page, &sums, sizeof(sums));
      total += sum(sums);
    }
    const float share = 1.0f / total;
    for (int64_t page = 0; page < pages_; page++) shares[page] *= share;
    tops_[head] = top, totals_[head] = total;
  }

  int heads_ = 0;
  int64_t pages_ = 0, stride_ = 0;
  std::vector<float> weights_, shares_, rotated_, turned_, balanced_, base_, inflation_, tops_, totals_;
};

}  // namespace calidrop
