// Recall by pages: one decode step of one (row, KV head) whose sequence recalls so (docs/recall.md, The rule). The meaning
// is ops/reference/recall.py's; the state over the kept tokens is there already.
#pragma once

#include "arguments.h"
#include "attend.h"
#include "pages.h"
#include "rest.h"

namespace calidrop {

// What one thread needs for one (row, KV head). out, lse: the state over the buffered pages.
template <class T>
struct RecallScratch {
  explicit RecallScratch(const Arguments& a)
      : out(a.model.group * a.model.head_dim), lse(a.model.group), held(kMaxBuffer), rank(held) {}
  std::vector<float> out, lse;
  std::vector<int64_t> held, rank;
  PageShares shares;
  Rest rest;
  std::vector<float> rest_out, rest_lse;
  WantedPages wanted;
  BufferPlaces places;
};

// One KV head of a sequence. query: as it came and in float32; out, lse: the state over the kept tokens, which becomes the
// attention (lse stays).
template <class T>
class Recall {
 public:
  Recall(const Arguments& a, int64_t slot, int64_t kv_head, const T* query, const float* query_float, float* out,
         const float* kept_lse, Workspace<T>& space, RecallScratch<T>& scratch)
      : a_(a),
        space_(space),
        s_(scratch),
        slot_(slot),
        kv_head_(kv_head),
        group_(int(a.model.group)),
        head_dim_(int(a.model.head_dim)),
        size_(int(a.recall.buffer_size[slot])),
        bits_(a.recall.rest[slot]),
        page_elements_(2 * kPage * a.model.head_dim),
        query_(query),
        query_float_(query_float),
        out_(out),
        kept_lse_(kept_lse) {
    const int64_t state = (slot * a.model.kv_heads + kv_head) * group_;
    state_query_ = (T*)a.state_query + state * head_dim_;
    state_out_ = a.state_out + state * head_dim_;
    state_lse_ = a.state_lse + state;
    for (int j = 0; j < size_; j++) s_.held[j] = a_.held[place(j)], s_.rank[j] = a_.rank[place(j)];
  }

  void step() {
    const bool looks = !a_.looked[slot_] || least_similarity() < a_.recall.theta[slot_];
    // What was held before this step's look. With a rest the stored state is that over everything.
    const bool buffered = (looks || !bits_) && attend_buffer();
    int64_t read = 0;
    if (looks)
      read = look(buffered);
    else if (size_ && !bits_)
      std::fill_n(state_lse_, group_, -kInf);
    const bool apart = buffered && !bits_;
    count(looks, apart, read);
    for (int h = 0; h < group_; h++) merge(h, apart);
  }

 private:
  int64_t place(int j) const { return int64_t(a_.recall.buffer_ids[slot_ * a_.recall.buffer_stride + j]) * a_.model.kv_heads + kv_head_; }

  T* buffered_page(int j) const { return (T*)a_.buffer + place(j) * page_elements_; }

  // K, then V, of one of the sequence's pages, where it lies. Whatever is returned must stay until it has been attended.
  const T* swapped_page(int64_t page) const {
    const int64_t block = a_.sequences.swap_blocks[slot_ * a_.sequences.swap_stride + page / kPagesPerBlock];
    const int64_t at = (block * a_.model.kv_heads + kv_head_) * kPagesPerBlock + page % kPagesPerBlock;
    return (const T*)a_.pool + at * page_elements_;
  }

  Tile<T> tile(const T* page, int64_t number) const {
    const int64_t tokens = std::min<int64_t>(a_.recall.stored[slot_] - number * kPage, kPage);
    return {page, page + kPage * head_dim_, 0, int(tokens)};
  }

  float least_similarity() const {
    float least = kInf;
    for (int h = 0; h < group_; h++) {
      const float rho = cosine(query_float_ + h * head_dim_, state_query_ + h * head_dim_, head_dim_);
      a_.observe(rho);
      least = rho < least || std::isnan(rho) ? rho : least;
    }
    return least;
  }

  // The state over the buffered pages with the current query, in the scratch; whether there are any.
  bool attend_buffer() {
    Attention<T> attention(space_, query_float_, group_, head_dim_, float(a_.scale), kPage, s_.out.data(),
                           s_.lse.data());
    bool any = false;
    for (int j = 0; j < size_; j++)
      if (s_.held[j] != kEmpty) {
        attention.add(tile(buffered_page(j), s_.held[j]));
        any = true;
      }
    if (any) attention.template finish<kKeyPlain, kValuePlain>();
    return any;
  }

  // Stores the state over the pages it reads, with a rest that over everything, and buffers the wanted pages. How many it
  // read.
  int64_t look(bool buffered) {
    const int64_t head = (slot_ * a_.model.kv_heads + kv_head_) * head_dim_;
    const Sketched sketch = {a_.codes,
                             a_.scales,
                             a_.recall.sketch_blocks + slot_ * a_.recall.sketch_stride,
                             a_.model.kv_heads,
                             kv_head_,
                             kPagesPerBlock,
                             a_.recall.stored[slot_],
                             int(a_.padded_dim / kWordChannels),
                             Levels::of_sizes(kInnerLevel, kOuterLevel),
                             bits_ ? a_.balance + head : nullptr,
                             bits_ ? kErrorVariance : 0};
    s_.shares.look(sketch, query_float_, group_, head_dim_, a_.mu + head, a_.signs, float(a_.scale), kept_lse_);
    const auto& wanted = s_.wanted.choose(s_.shares, {a_.recall.eps[slot_], a_.recall.top_p[slot_], a_.recall.most[slot_]});
    const auto held_end = s_.held.begin() + size_;
    Attention<T> attention(space_, query_float_, group_, head_dim_, float(a_.scale), kPage, state_out_, state_lse_);
    int64_t read = 0;
    for (const int64_t page : wanted)
      if (std::find(s_.held.begin(), held_end, page) == held_end) {
        attention.add(tile(swapped_page(page), page));
        read++;
      }
    attention.template finish<kKeyPlain, kValuePlain>();
    if (bits_) add_rest(sketch, wanted, buffered);
    std::copy_n(query_, group_ * head_dim_, state_query_);
    if (size_) keep(wanted);
    return read;
  }

  // The stored state becomes that over the pages read, the pages held, and the codes of all others.
  void add_rest(const Sketched& sketch, const std::vector<int64_t>& wanted, bool buffered) {
    s_.rest.begin(s_.shares);
    for (const int64_t page : wanted) s_.rest.exclude(page);
    for (int j = 0; j < size_; j++)
      if (s_.held[j] != kEmpty) s_.rest.exclude(s_.held[j]);
    s_.rest_out.resize(group_ * head_dim_), s_.rest_lse.resize(group_);
    const CodedValues values = {a_.value_codes, a_.value_scales,
                                a_.value_mu + (slot_ * a_.model.kv_heads + kv_head_) * head_dim_, a_.value_page_bytes, bits_};
    s_.rest.attend(sketch, s_.shares, values, kNegligible, a_.signs, head_dim_, s_.rest_out.data(), s_.rest_lse.data());
    for (int h = 0; h < group_; h++) {
      const long at = long(h) * head_dim_;
      if (buffered) merge_into(state_out_ + at, state_lse_[h], s_.out.data() + at, s_.lse[h], head_dim_);
      merge_into(state_out_ + at, state_lse_[h], s_.rest_out.data() + at, s_.rest_lse[h], head_dim_);
    }
  }

  void keep(const std::vector<int64_t>& wanted) {
    const auto& places = s_.places.renew(s_.held.data(), s_.rank.data(), size_, wanted);
    for (size_t i = 0; i < wanted.size(); i++)
      if (places[i] >= 0) std::copy_n(swapped_page(wanted[i]), page_elements_, buffered_page(places[i]));
    for (int j = 0; j < size_; j++) a_.held[place(j)] = s_.held[j], a_.rank[place(j)] = s_.rank[j];
  }

  // The kept tokens' state, the stored one and the buffered one become the attention of head h.
  void merge(int h, bool buffered) {
    float weights[3] = {kept_lse_[h], state_lse_[h], buffered ? s_.lse[h] : -kInf};
    const float top = std::max({weights[0], weights[1], weights[2]});
    float total = 0;
    for (float& weight : weights) total += weight = std::exp(weight - top);
    float* out = out_ + h * head_dim_;
    const float *stored = state_out_ + h * head_dim_, *held = s_.out.data() + h * head_dim_;
    for (int d = 0; d < head_dim_; d++) {
      out[d] = out[d] * (weights[0] / total) + stored[d] * (weights[1] / total);
      if (buffered) out[d] += held[d] * (weights[2] / total);
    }
  }

  void count(bool looks, bool buffered, int64_t read) const {
    int64_t merges = 0;
    for (int h = 0; h < group_ && !looks; h++) merges += state_lse_[h] > -kInf || (buffered && s_.lse[h] > -kInf);
    a_.count(slot_, kCountRecomputes, looks ? group_ : 0);
    a_.count(slot_, kCountMerges, merges);
    a_.count(slot_, kCountPlain, group_ - merges - (looks ? group_ : 0));
    a_.count(slot_, kCountGroupReads, read > 0);
    a_.count(slot_, kCountPagesRead, read);
  }

  const Arguments& a_;
  Workspace<T>& space_;
  RecallScratch<T>& s_;
  int64_t slot_, kv_head_;
  int group_, head_dim_, size_, bits_;
  int64_t page_elements_;
  const T* query_;
  const float* query_float_;
  float* out_;
  const float* kept_lse_;
  T* state_query_;
  float *state_out_, *state_lse_;
};

}  // namespace calidrop
