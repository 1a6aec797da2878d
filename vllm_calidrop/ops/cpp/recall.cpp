// Recall by pages: one decode step of one layer for all rows that recall so (docs/recall.md, The rule).
// The meaning is ops/recall.py's; the state over the kept tokens is there already.

#include <cmath>

#include "attend.h"
#include "pages.h"
#include "sketch.h"

namespace calidrop {

// The fields, their order and their types are those of native/recall.py::_Arguments.
extern "C" struct RecallArguments {
  int64_t dtype, threads;
  int64_t rows, kv_heads, group, head_dim;
  double scale;
  // Of all the step's rows: [.., kv_heads, group, D], [.., kv_heads, group]; out, lse: the state over the kept tokens.
  const void* query;
  float* out;
  const float* lse;
  // Of the rows that recall by pages.
  const int64_t *row, *slots;
  const float *theta, *eps, *top_p;
  const int64_t *most, *buffer_size, *stored;
  const int64_t *swap_blocks, *sketch_blocks, *buffer_ids;
  int64_t swap_stride, sketch_stride, buffer_stride;
  // This layer's part of the swap pool [blocks, kv_heads, pages, 2, 16, D].
  const void* pages;
  int64_t pages_per_block;
  // This layer's part of the store: the sketch (sketch.h), mu [slots, kv_heads, D], looked [slots], the page buffer
  // [pages, kv_heads, 2, 16, D] and which pages it holds, and how new they are [pages, kv_heads].
  const uint8_t* codes;
  const uint16_t* scales;
  const float* mu;
  uint8_t* looked;
  void* buffer;
  int64_t *held, *rank;
  // The rotation and the quantiser's levels.
  const float* signs;
  int64_t padded_dim;
  double inner, outer;
  // This layer's part of the state table: [slots, kv_heads, group(, D)]; counts by slots of counts_stride.
  void* state_query;
  float *state_out, *state_lse;
  int64_t* counts;
  int64_t counts_stride;
};

namespace {

using Arguments = RecallArguments;

enum Counter { kRecomputes, kMerges, kPlain, kGroupReads, kPagesRead, kCounters };

// What one thread needs for one (row, KV head).
template <class T>
struct Scratch {
  explicit Scratch(const Arguments& a)
      : query(a.group * a.head_dim), out(a.group * a.head_dim), lse(a.group), held(BufferPlaces::kMost), rank(held) {}
  std::vector<float> query, out, lse;
  std::vector<int64_t> held, rank, read;
  PageShares shares;
  WantedPages wanted;
  BufferPlaces places;
  Workspace<T> space;
};

// One row and KV head of a step.
template <class T>
class Recall {
 public:
  Recall(const Arguments& a, int64_t index, int64_t kv_head, Scratch<T>& scratch)
      : a_(a),
        s_(scratch),
        index_(index),
        kv_head_(kv_head),
        slot_(a.slots[index]),
        group_(int(a.group)),
        head_dim_(int(a.head_dim)),
        size_(int(a.buffer_size[index])),
        page_elements_(2 * kPage * a.head_dim) {
    const int64_t pair = a.row[index] * a.kv_heads + kv_head, state = (slot_ * a.kv_heads + kv_head) * group_;
    query_ = (const T*)a.query + pair * group_ * head_dim_;
    out_ = a.out + pair * group_ * head_dim_;
    kept_lse_ = a.lse + pair * group_;
    state_query_ = (T*)a.state_query + state * head_dim_;
    state_out_ = a.state_out + state * head_dim_;
    state_lse_ = a.state_lse + state;
    for (int i = 0; i < group_ * head_dim_; i++) s_.query[i] = to_float(query_[i]);
    for (int j = 0; j < size_; j++) s_.held[j] = a_.held[place(j)], s_.rank[j] = a_.rank[place(j)];
  }

  void step() {
    const bool looks = !a_.looked[slot_] || least_similarity() < a_.theta[index_];
    const bool buffered = attend_buffer();  // what was held before this step's look
    int64_t read = 0;
    if (looks)
      read = look();
    else if (size_)
      std::fill_n(state_lse_, group_, -kInf);
    count(looks, buffered, read);
    for (int h = 0; h < group_; h++)
      merge(h, buffered);
  }

 private:
  int64_t place(int j) const { return a_.buffer_ids[index_ * a_.buffer_stride + j] * a_.kv_heads + kv_head_; }

  T* buffered_page(int j) const { return (T*)a_.buffer + place(j) * page_elements_; }

  // K, then V, of one of the sequence's pages, where it lies. Whatever is returned must stay until it has been attended.
  const T* swapped_page(int64_t page) const {
    const int64_t block = a_.swap_blocks[index_ * a_.swap_stride + page / a_.pages_per_block];
    const int64_t at = (block * a_.kv_heads + kv_head_) * a_.pages_per_block + page % a_.pages_per_block;
    return (const T*)a_.pages + at * page_elements_;
  }

  Tile<T> tile(const T* page, int64_t number) const {
    const int64_t tokens = std::min<int64_t>(a_.stored[index_] - number * kPage, kPage);
    return {page, page + kPage * head_dim_, 0, int(tokens)};
  }

  float least_similarity() const {
    float least = kInf;
    for (int h = 0; h < group_; h++) {
      Floats ab = {}, aa = {}, bb = {};
      for (int d = 0; d < head_dim_; d += kLanes) {
        const Floats x = load(s_.query.data() + h * head_dim_ + d), y = load(state_query_ + h * head_dim_ + d);
        ab += x * y, aa += x * x, bb += y * y;
      }
      const float norms = std::sqrt(sum(aa)) * std::sqrt(sum(bb));
      least = std::min(least, sum(ab) / std::max(norms, std::numeric_limits<float>::min()));
    }
    return least;
  }

  // The state over the buffered pages with the current query, in the scratch; whether there are any.
  bool attend_buffer() {
    Attention<T> attention(s_.space, s_.query.data(), group_, head_dim_, float(a_.scale), kPage, s_.out.data(),
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

  // Stores the state over the pages it reads, and buffers the wanted ones. How many it read.
  int64_t look() {
    const Sketched sketch = {a_.codes,
                             a_.scales,
                             a_.sketch_blocks + index_ * a_.sketch_stride,
                             a_.kv_heads,
                             kv_head_,
                             a_.pages_per_block,
                             a_.stored[index_],
                             int(a_.padded_dim / kWordChannels),
                             {float(a_.inner), float(a_.outer)}};
    s_.shares.look(sketch, s_.query.data(), group_, head_dim_, a_.mu + (slot_ * a_.kv_heads + kv_head_) * head_dim_,
                   a_.signs, float(a_.scale), kept_lse_);
    const auto& wanted = s_.wanted.choose(s_.shares, {a_.eps[index_], a_.top_p[index_], a_.most[index_]});
    const auto held_end = s_.held.begin() + size_;
    Attention<T> attention(s_.space, s_.query.data(), group_, head_dim_, float(a_.scale), kPage, state_out_, state_lse_);
    int64_t read = 0;
    for (const int64_t page : wanted)
      if (std::find(s_.held.begin(), held_end, page) == held_end) {
        attention.add(tile(swapped_page(page), page));
        read++;
      }
    attention.template finish<kKeyPlain, kValuePlain>();
    std::copy_n(query_, group_ * head_dim_, state_query_);
    if (size_) keep(wanted);
    return read;
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
    int64_t add[kCounters] = {};
    add[kRecomputes] = looks ? group_ : 0;
    add[kMerges] = merges;
    add[kPlain] = group_ - add[kRecomputes] - merges;
    add[kGroupReads] = read > 0;
    add[kPagesRead] = read;
    for (int i = 0; i < kCounters; i++)
      if (add[i]) __atomic_fetch_add(a_.counts + slot_ * a_.counts_stride + i, add[i], __ATOMIC_RELAXED);
  }

  const Arguments& a_;
  Scratch<T>& s_;
  int64_t index_, kv_head_, slot_;
  int group_, head_dim_, size_;
  int64_t page_elements_;
  const T* query_;
  T* state_query_;
  float *out_, *state_out_, *state_lse_;
  const float* kept_lse_;
};

template <class T>
void recall(const Arguments& a) {
  const int64_t pairs = a.rows * a.kv_heads;
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1 && pairs > 1)
  {
    Scratch<T> scratch(a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t pair = 0; pair < pairs; pair++)
      Recall<T>(a, pair / a.kv_heads, pair % a.kv_heads, scratch).step();
  }
  for (int64_t i = 0; i < a.rows; i++) a.looked[a.slots[i]] = 1;
}

}  // namespace

// 0, or 1 where there is no kernel for the element type.
extern "C" int calidrop_recall(const RecallArguments* a) {
  if (a->head_dim % kLanes || a->padded_dim % kWordChannels || a->pages_per_block % kLookSums) return 1;
  if (a->dtype == kFloat32)
    recall<float>(*a);
  else if (a->dtype == kBFloat16)
    recall<bf16>(*a);
#if CALIDROP_HAS_FP16
  else if (a->dtype == kFloat16)
    recall<fp16>(*a);
#endif
  else
    return 1;
  return 0;
}

extern "C" int64_t calidrop_recall_arguments_bytes() { return sizeof(RecallArguments); }

}  // namespace calidrop
