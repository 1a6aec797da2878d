// The rest: attention over the evicted tokens that are not read, from the weights of a look and coded values. One pass over
// the codes as they lie, summed in the rotated space and turned back once. The meaning is evicted/recall/rest.py's.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "sketch.h"

namespace calidrop {

// A KV head's coded values: of a page, a word for each of 16 * num_words channels, with the codes of its 16 tokens.
struct CodedValues {
  const uint8_t* codes;    // of the layer: [blocks, KV heads, pages, page_bytes]
  const uint16_t* scales;  // [blocks, KV heads, pages, kPage]
  const float* mu;         // the mean value, [D]
  int64_t page_bytes;      // at least 16 * num_words * 2 * bits
  int bits;                // of a channel: 1 or 2
};

// The words of 16 channels, in the lowest bits.
template <int bits, class V>
inline V load_words(const uint8_t* from) {
  if constexpr (kIsPair<V>) {
    typedef decltype(V::lo) Half;
    return {load_words<bits, Half>(from), load_words<bits, Half>(from + 2 * bits * (sizeof(Half) / sizeof(float)))};
  } else if constexpr (bits == 2) {
    return load_as<Part>(from);
  } else {
    return (Part)load_halfwords(from);
  }
}

// State over the pages of a look that are attended by nothing else; a thread keeps one and uses it again.
class Rest {
 public:
  // No page is excluded; as many as the look has.
  void begin(const PageShares& shares) { is_excluded_.assign(shares.pages(), 0); }
  // This page is attended otherwise.
  void exclude(int64_t page) { is_excluded_[page] = 1; }

  // sketch, shares: of the look. negligible: pages whose share times the number of pages is below this for every head give
  // their weight to the mean value. signs: of the rotation. out: [heads, D], lse: [heads].
  void attend(const Sketched& sketch, const PageShares& shares, const CodedValues& values, float negligible,
              const float* signs, int head_dim, float* out, float* lse) {
    const int heads = shares.heads(), size = sketch.num_words * kWordChannels;
    choose(shares, negligible);
    sums_.resize(heads * size);
    weigh(sketch, shares, values);
    if (values.bits == 2)
      add<2>(sketch, values, heads, sketch.levels);
    else
      add<1>(sketch, values, heads, Levels::of_signs());
    for (int h = 0; h < heads; h++) finish(shares, values, h, size, signs, head_dim, out + h * head_dim, lse + h);
  }

 private:
  // The pages whose values count.
  void choose(const PageShares& shares, float negligible) {
    pages_.clear();
    for (int64_t page = 0; page < shares.pages(); page++) {
      float largest = shares.of(0, page);
      for (int h = 1; h < shares.heads(); h++) largest = std::max(largest, shares.of(h, page));
      if (!is_excluded_[page] && largest * float(shares.pages()) >= negligible) pages_.push_back(page);
    }
  }

  // Their tokens' weights times scales: weighted_ [heads, pages chosen, kPage].
  void weigh(const Sketched& sketch, const PageShares& shares, const CodedValues& values) {
    const int64_t chosen = pages_.size();
    weighted_.resize(shares.heads() * chosen * kPage);
    at_.resize(chosen);
    for (int64_t i = 0; i < chosen; i++) {
      at_[i] = sketch.page_at(pages_[i]);
      const Floats scales = load_scales<Floats>(values.scales + at_[i] * kPage);
      const int tokens = int(std::min<int64_t>(sketch.tokens - pages_[i] * kPage, kPage));
      for (int h = 0; h < shares.heads(); h++) {
        float* to = weighted_.data() + (h * chosen + i) * kPage;
        store(to, load(shares.weights(h, pages_[i])) * scales);
        std::fill(to + tokens, to + kPage, 0.0f);
      }
    }
  }

  template <int bits>
  void add(const Sketched& sketch, const CodedValues& values, int heads, const Levels& levels) {
    int h = 0;
    for (; h + 4 <= heads; h += 4) add_heads<bits, 4, kLookSums / 4>(sketch, values, h, levels);
    for (; h + 2 <= heads; h += 2) add_heads<bits, 2, kLookSums / 2>(sketch, values, h, levels);
    for (; h < heads; h++) add_heads<bits, 1, kLookSums>(sketch, values, h, levels);
  }

  template <int bits, int H, int V>
  void add_heads(const Sketched& sketch, const CodedValues& values, int head, const Levels& levels) {
    int word = 0;
    for (; word + V <= sketch.num_words; word += V) add_words<bits, H, V>(sketch, values, head, word, levels);
    for (; word < sketch.num_words; word++) add_words<bits, H, 1>(sketch, values, head, word, levels);
  }

  // Sums of 16 * V channels for H heads, over all pages chosen.
  template <int bits, int H, int V>
  void add_words(const Sketched& sketch, const CodedValues& values, int head, int word, const Levels& levels) {
    constexpr int kWordBytes = kWordChannels * 2 * bits;
    const int64_t chosen = at_.size(), stride = chosen * kPage;
    const int size = sketch.num_words * kWordChannels;
    Floats sums[V][H] = {};
    const float* weights = weighted_.data() + head * stride;
    for (int64_t i = 0; i < chosen; i++, weights += kPage) {
      const uint8_t* from = values.codes + at_[i] * values.page_bytes + word * kWordBytes;
      Floats codes[V];
      for (int v = 0; v < V; v++) codes[v] = load_words<bits, Floats>(from + v * kWordBytes);
      for (int t = 0; t < kPage; t++)
        for (int v = 0; v < V; v++) {
          const Floats level = levels(codes[v]);
          codes[v] = next_codes<bits>(codes[v]);
          for (int h = 0; h < H; h++) sums[v][h] += level * weights[h * stride + t];
        }
    }
    for (int v = 0; v < V; v++)
      for (int h = 0; h < H; h++) store(sums_.data() + (head + h) * size + (word + v) * kWordChannels, sums[v][h]);
  }

  // Turned back, divided by the weight of the rest, around the mean value.
  void finish(const PageShares& shares, const CodedValues& values, int head, int size, const float* signs, int head_dim,
              float* out, float* lse) {
    float share = 0;
    bool any = false;
    for (int64_t page = 0; page < shares.pages(); page++)
      if (!is_excluded_[page]) any = true, share += shares.of(head, page);
    if (!any || std::isnan(share)) {  // nothing is left, or the head's KV must not be read
      std::fill_n(out, head_dim, 0.0f);
      *lse = -kInf;
      return;
    }
    // Where all weights underflow the state is the mean value, of the least weight that there is: not that over nothing.
    const float weight = std::max(share * shares.total(head), std::numeric_limits<float>::min());
    *lse = shares.top(head) + std::log(weight);
    float* sums = sums_.data() + head * size;
    transform(sums, size);
    const float factor = 1 / (weight * std::sqrt(float(size)));
    for (int d = 0; d < head_dim; d++) out[d] = sums[d] * signs[d] * factor + values.mu[d];
  }

  std::vector<char> is_excluded_;
  std::vector<int64_t> pages_, at_;
  std::vector<float> weighted_, sums_;
};

}  // namespace calidrop
