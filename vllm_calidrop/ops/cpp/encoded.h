// Attention over evicted KV that a codec stored, from its codes: nothing is decoded.
//
// A key is offset + gain * scale * number per channel, so its product with a query is <query, offset> plus gain times
// <query * scale, number>: a range's offsets and scales are multiplied into the query once. A value is offset + scale *
// number per token, so the token's weight takes its scale, and all dimensions the same sum of weighted offsets. Outlier
// tokens are attended as they were.
#pragma once

#include "attend.h"

namespace calidrop {

constexpr int kCodedTokens = 16;      // of a page
constexpr int kMostGroupTokens = 256;  // positions of outlier tokens are bytes

// Tokens of a run that share a head: where it begins, and how many of its tokens belong to the run.
struct Group {
  const uint8_t* at;
  int tokens;
};

// What an EncodedAttention works in; a thread keeps one and uses it again.
struct EncodedSpace {
  std::vector<float> query, weights, exact, scales;
  std::vector<float> base, middle, extra;
  std::vector<Softmax> sums;
  std::vector<Group> groups;
};

// T: the cache's dtype, which outlier tokens are kept in. E: the kind of codes.
template <class T, class E>
class EncodedAttention {
 public:
  // query: [heads, D] fp32; out: [heads, D], lse: [heads].
  EncodedAttention(EncodedSpace& space, const CodecLayout& layout, const float* query, int heads, int head_dim,
                   float scale, float* out, float* lse)
      : space_(space), layout_(layout), asked_(query), heads_(heads), head_dim_(head_dim), scale_(scale), out_(out), lse_(lse) {
    space.query.resize(heads * head_dim), space.exact.resize(head_dim), space.scales.resize(head_dim);
    space.weights.resize(heads * kMostGroupTokens);
    for (auto* each : {&space.base, &space.middle, &space.extra}) each->assign(heads, 0.0f);
    space.sums.assign(heads, Softmax{});
    std::fill(out, out + heads * head_dim, 0.0f);
  }

  // The states over all groups of a run.
  void attend(const std::vector<Group>& groups) {
    if (!groups.empty()) tiles_of(groups[0], tiles_[0]);
    for (size_t i = 0; i < groups.size(); i++) {
      const bool has_next = i + 1 < groups.size();
      const int count = pages_of(groups[i]), left = has_next ? tiles_of(groups[i + 1], tiles_[(i + 1) % 2]) : 0;
      if (has_next) fetch(groups[i + 1].at, layout_.head_bytes);
      attend_group(groups[i], {tiles_[i % 2], tiles_[(i + 1) % 2], count, left});
    }
    for (int h = 0; h < heads_; h++) {
      float* out = out_ + h * head_dim_;
      for (int d = 0; d < head_dim_; d++) out[d] = (out[d] + space_.extra[h]) * space_.sums[h].share();
      lse_[h] = space_.sums[h].lse();
    }
  }

 private:
  static float number(const uint8_t* from) { return to_float(load_as<bf16>(from)); }
  static int pages_of(const Group& group) { return (group.tokens + kCodedTokens - 1) / kCodedTokens; }
  const uint8_t* page(const Group& group, int index) const {
    return group.at + layout_.head_bytes + index * layout_.page_bytes;
  }

  int tiles_of(const Group& group, Tile<E>* tiles) const {
    const int count = pages_of(group);
    for (int i = 0; i < count; i++) {
      const E* keys = (const E*)page(group, i);
      tiles[i] = {keys, keys + kCodedTokens * layout_.code_bytes, 0, std::min(group.tokens - i * kCodedTokens, kCodedTokens)};
    }
    return count;
  }

  void attend_group(const Group& group, const Run<E>& run) {
    float* weights = space_.weights.data();
    for (int first = 0; first < run.count; first += layout_.pages_per_range) {
      const int end = std::min<int>(run.count, first + layout_.pages_per_range);
      fold_range(group, first / layout_.pages_per_range);
      for (int i = first; i < end; i++)
        tile_logits<kKeyPlain>(run.tiles[i], kCodedTokens, head_dim_, space_.query.data(), heads_,
                               weights + i * kCodedTokens, kMostGroupTokens);
      for (int h = 0; h < heads_; h++) finish_logits(group, first, end, h);
    }
    exact_logits(group);
    for (int h = 0; h < heads_; h++) softmax(run.count, h);
    exact_values(group);
    for (int h = 0; h < heads_; h++) weigh_codes(group, run.count, h);
    add_values<kValuePlain>(run, kCodedTokens, head_dim_, weights, heads_, kMostGroupTokens, out_);
  }

  // The queries take the scales of the range's key channels.
  void fold_range(const Group& group, int index) {
    const bf16* offsets = (const bf16*)(group.at + index * layout_.range_bytes);
    if (layout_.fine) widen_scales((const uint8_t*)(offsets + head_dim_), positions(group)[layout_.outliers + index]);
    for (int h = 0; h < heads_; h++) {
      const float* asked = asked_ + h * head_dim_;
      Floats base = {}, sums = {};
      for (int d = 0; d < head_dim_; d += kLanes) {
        const Floats scale = layout_.fine ? load(space_.scales.data() + d) : load(offsets + head_dim_ + d);
        const Floats q = load(asked + d), scaled = q * scale;
        base += q * load(offsets + d), sums += scaled;
        store(space_.query.data() + h * head_dim_ + d, scaled * E::kUnit);
      }
      space_.base[h] = sum(base), space_.middle[h] = E::kMiddle * sum(sums);
    }
  }

  // Scales of a byte: a float's last bits of exponent and first ones of mantissa.
  void widen_scales(const uint8_t* scales, uint32_t exponent) {
    uint32_t* bits = (uint32_t*)space_.scales.data();
    for (int d = 0; d < head_dim_; d++) bits[d] = scales[d] ? (exponent << 23) + (uint32_t(scales[d]) << 19) : 0;
  }

  // Products with codes of pages [first, end), which are a range's, become logits.
  void finish_logits(const Group& group, int first, int end, int head) {
    float* logits = space_.weights.data() + head * kMostGroupTokens;
    const float base = space_.base[head], middle = space_.middle[head];
    for (int i = first; i < end; i++) {
      float* at = logits + i * kCodedTokens;
      Floats found = load(at) - middle;
      if (layout_.fine) found = found * gains(page(group, i) + kCodedTokens * (2 * layout_.code_bytes + 4));
      store(at, keep((found + base) * scale_, 0, group.tokens - i * kCodedTokens));
    }
  }

  // A byte stands for (byte + 64) / 128.
  static Floats gains(const uint8_t* bytes) {
    typedef Codes<8> Byte;
    return (lanes_at<Floats>((const Byte*)bytes, 0) + (128.0f + 64.0f)) * (1.0f / 128.0f);
  }

  const uint8_t* positions(const Group& group) const {
    return group.at + layout_.pages_per_group / layout_.pages_per_range * layout_.range_bytes;
  }

  // The group's outlier tokens that belong to the run: f(token, exact K, exact V).
  template <class F>
  void outliers(const Group& group, F f) {
    const uint8_t* at = positions(group);
    const T* exact = (const T*)(at + layout_.position_bytes);
    for (int64_t i = 0; i < layout_.outliers; i++, exact += 2 * head_dim_)
      if (at[i] < group.tokens) f(at[i], exact, exact + head_dim_);
  }

  void exact_logits(const Group& group) {
    outliers(group, [this](int token, const T* key, const T*) {
      for (int h = 0; h < heads_; h++) {
        Floats dot = {};
        for (int d = 0; d < head_dim_; d += kLanes) dot += load(asked_ + h * head_dim_ + d) * load(key + d);
        space_.weights[h * kMostGroupTokens + token] = sum(dot) * scale_;
      }
    });
  }

  void softmax(int pages, int head) {
    float* weights = space_.weights.data() + head * kMostGroupTokens;
    Floats tops = broadcast(-kInf), totals = {};
    for (int t = 0; t < pages * kCodedTokens; t += kLanes) tops = max(tops, load(weights + t));
    Softmax& sums = space_.sums[head];
    const float shrink = sums.raise(maximum(tops));
    if (shrink != 1) scale_by(shrink, out_ + head * head_dim_, head_dim_), space_.extra[head] *= shrink;
    for (int t = 0; t < pages * kCodedTokens; t += kLanes) {
      const Floats weight = exp_nonpositive(load(weights + t) - sums.top);
      store(weights + t, weight);
      totals += weight;
    }
    sums.total += sum(totals);
  }

  // Outlier tokens have their values' share now, and no weight for their codes.
  void exact_values(const Group& group) {
    outliers(group, [this](int token, const T*, const T* value) {
      for (int h = 0; h < heads_; h++) {
        float& weight = space_.weights[h * kMostGroupTokens + token];
        float* out = out_ + h * head_dim_;
        for (int d = 0; d < head_dim_; d += kLanes) store(out + d, load(out + d) + load(value + d) * weight);
        weight = 0;
      }
    });
  }

  // Weights of tokens become weights of their codes.
  void weigh_codes(const Group& group, int pages, int head) {
    float* weights = space_.weights.data() + head * kMostGroupTokens;
    Floats extra = {};
    for (int i = 0; i < pages; i++) {
      const Floats line = load_line((const bf16*)(page(group, i) + 2 * kCodedTokens * layout_.code_bytes));
      const Floats offset = evens(line), scale = odds(line), weight = load(weights + i * kCodedTokens);
      extra += weight * (offset - scale * E::kMiddle);
      store(weights + i * kCodedTokens, weight * scale * E::kUnit);
    }
    space_.extra[head] += sum(extra);
  }

  EncodedSpace& space_;
  const CodecLayout& layout_;
  const float* asked_;
  int heads_, head_dim_;
  float scale_;
  float *out_, *lse_;
  Tile<E> tiles_[2][kMostGroupTokens / kCodedTokens];
};

// The same, for whatever codes the layout says.
template <class T>
inline void attend_encoded(EncodedSpace& space, const CodecLayout& layout, const std::vector<Group>& groups,
                           const float* query, int heads, int head_dim, float scale, float* out, float* lse) {
  const auto attend = [&](auto code) {
    EncodedAttention<T, decltype(code)>(space, layout, query, heads, head_dim, scale, out, lse).attend(groups);
  };
  if (layout.is_float)
    attend(FloatCodes{});
  else if (layout.bits == 8)
    attend(Codes<8>{});
  else if (layout.bits == 4)
    attend(Codes<4>{});
  else
    attend(Codes<2>{});
}

}  // namespace calidrop
