// One decode step of one layer for a whole batch (Algorithm 2): the kept tokens' state, the gate, recomputation, merge;
// or, of a sequence that recalls by pages, the look and what it recalls (recall.h). The meaning is
// ops/reference/decode.py's, the arithmetic of the gate algorithm/calibration.py's.

#include "arguments.h"
#include "attend.h"
#include "encoded.h"
#include "recall.h"

namespace calidrop {
namespace {

// What one thread needs for one (row, KV head).
template <class T>
struct Scratch {
  explicit Scratch(const Arguments& a)
      : query(a.model.group * a.model.head_dim),
        out(query.size()),
        asked(query.size()),
        renewed(query.size()),
        lse(a.model.group),
        renewed_lse(a.model.group),
        rho(a.model.group),
        recompute(a.model.group),
        merge(a.model.group),
        recall(a) {}
  std::vector<float> query, out, asked, renewed, lse, renewed_lse, rho;
  std::vector<char> recompute, merge;
  Workspace<T> space;
  EncodedSpace encoded;
  RecallScratch<T> recall;
};

// One row and KV head of a step, whose row has a calibration state unless `stored` is 0.
template <class T>
class Head {
 public:
  Head(const Arguments& a, int64_t row, int64_t kv_head, Scratch<T>& scratch)
      : a_(a),
        s_(scratch),
        row_(row),
        slot_(a.rows.slot[row]),
        kv_head_(kv_head),
        group_(int(a.model.group)),
        head_dim_(int(a.model.head_dim)),
        stored_(slot_ < 0 ? 0 : a.sequences.stored[slot_]),
        state_((slot_ * a.model.kv_heads + kv_head) * group_) {
    const int64_t elements = group_ * head_dim_, token = a.rows.token[row];
    query_ = (const T*)a.query + token * a.query_stride + kv_head * elements;
    out_ = (T*)a.out + token * a.out_stride + kv_head * elements;
    for (int64_t i = 0; i < elements; i++) s_.query[i] = to_float(query_[i]);
  }

  bool is_calibrated() const { return stored_ > 0; }
  bool recalls() const { return slot_ >= 0 && a_.recall.stored[slot_] > 0; }

  // Similarities and decisions. barred: the read budget keeps the group from recomputing.
  void decide(bool barred) {
    float low = kInf, mean = 0;
    for (int h = 0; h < group_; h++) {
      s_.rho[h] = cosine(s_.query.data() + h * head_dim_, (const T*)a_.state_query + (state_ + h) * head_dim_, head_dim_);
      low = std::min(low, s_.rho[h]), mean += s_.rho[h];
    }
    mean /= group_;
    const int32_t gate = a_.sequences.gate[slot_];
    for (int h = 0; h < group_; h++) {
      const float for_recompute = gate == kGateGroup ? low : gate == kGateHead ? s_.rho[h] : mean;
      const float for_merge = gate == kGateGroupMean ? mean : s_.rho[h];
      s_.recompute[h] = !barred && for_recompute < a_.sequences.theta1[slot_];
      s_.merge[h] = !s_.recompute[h] && for_merge > a_.sequences.theta2[slot_];
    }
    similarity_ = gate == kGateGroupMean ? mean : low;
  }

  // After `decide`: whether some head recomputes, and what the read budget ranks the group by.
  bool wants_to_read() const { return std::find(s_.recompute.begin(), s_.recompute.end(), char(1)) != s_.recompute.end(); }
  float similarity() const { return similarity_; }

  template <int K, int V>
  void attend_kept() {
    const int width = int(a_.model.block_size);
    Attention<T> attention(s_.space, s_.query.data(), group_, head_dim_, float(a_.scale), width, s_.out.data(), s_.lse.data());
    const int32_t* blocks = a_.rows.table + row_ * a_.rows.table_stride;
    const int64_t start = slot_ < 0 ? 0 : a_.sequences.start[slot_], end = a_.rows.end[row_];
    for (int64_t column = start / width; column * width < end; column++) {
      const T* keys = (const T*)a_.cache + blocks[column] * a_.block_stride + kv_head_ * a_.head_stride;
      const int64_t base = column * width;
      attention.add({keys, keys + long(width) * head_dim_, int(std::max<int64_t>(start - base, 0)),
                     int(std::min<int64_t>(end - base, width))});
    }
    attention.template finish<K, V>();
  }

  // The gate, what it asks for, and the merge, into the state over the kept tokens.
  void calibrate(bool barred) {
    decide(barred);
    count();
    observe();
    recompute();
    for (int h = 0; h < group_; h++)
      if (s_.recompute[h] || s_.merge[h])
        merge_into(s_.out.data() + h * head_dim_, s_.lse[h], a_.state_out + (state_ + h) * head_dim_, a_.state_lse[state_ + h],
                   head_dim_);
  }

  void recall() {
    Recall<T>(a_, slot_, kv_head_, query_, s_.query.data(), s_.out.data(), s_.lse.data(), s_.space, s_.recall).step();
  }

  void store() {
    for (int64_t i = 0; i < group_ * head_dim_; i++) from_float(s_.out[i], out_ + i);
  }

 private:
  const int32_t* blocks() const { return a_.sequences.swap_blocks + slot_ * a_.sequences.swap_stride; }

  // The states of the first `heads` queries of s.asked over the evicted tokens, page by page where they lie.
  void attend_evicted(int heads) {
    const int64_t page_elements = 2 * kPageTokens * head_dim_;
    Attention<T> attention(s_.space, s_.asked.data(), heads, head_dim_, float(a_.scale), kPageTokens, s_.renewed.data(),
                           s_.renewed_lse.data());
    for (int64_t first = 0; first < stored_; first += kPageTokens) {
      const int64_t page = first / kPageTokens, block = blocks()[page / kPagesPerBlock];
      const T* keys = (const T*)a_.pool +
                      ((block * a_.model.kv_heads + kv_head_) * kPagesPerBlock + page % kPagesPerBlock) * page_elements;
      attention.add({keys, keys + kPageTokens * head_dim_, 0, int(std::min<int64_t>(stored_ - first, kPageTokens))});
    }
    attention.template finish<kKeyPlain, kValuePlain>();
  }

  // The same of encoded tokens, group by group.
  void attend_codes(const CodecLayout& layout, int heads) {
    s_.encoded.groups.clear();
    for (int64_t first = 0, pages; first < stored_; first += pages * kPageTokens) {
      const int64_t block = first / kPageTokens / layout.pages_per_block, page = first / kPageTokens % layout.pages_per_block;
      const uint8_t* at = a_.pool + (blocks()[block] * a_.model.kv_heads + kv_head_) * a_.block_bytes;
      pages = std::min<int64_t>(layout.pages_per_group, layout.pages_per_block - page);
      s_.encoded.groups.push_back({at + page / layout.pages_per_group * layout.group_bytes,
                                   int(std::min<int64_t>(stored_ - first, pages * kPageTokens))});
    }
    attend_encoded<T>(s_.encoded, layout, s_.encoded.groups, s_.asked.data(), heads, head_dim_, float(a_.scale),
                      s_.renewed.data(), s_.renewed_lse.data());
  }

  void recompute() {
    int asking = 0;
    for (int h = 0; h < group_; h++)
      if (s_.recompute[h]) std::copy_n(s_.query.data() + h * head_dim_, head_dim_, s_.asked.data() + asking++ * head_dim_);
    if (!asking) return;
    if (const int32_t codec = a_.sequences.codec[slot_])
      attend_codes(a_.sequences.layouts[codec], asking);
    else
      attend_evicted(asking);
    for (int h = 0, from = 0; h < group_; h++)
      if (s_.recompute[h]) {
        std::copy_n(query_ + h * head_dim_, head_dim_, (T*)a_.state_query + (state_ + h) * head_dim_);
        std::copy_n(s_.renewed.data() + from * head_dim_, head_dim_, a_.state_out + (state_ + h) * head_dim_);
        a_.state_lse[state_ + h] = s_.renewed_lse[from++];
      }
  }

  void count() const {
    int64_t recomputes = 0, merges = 0;
    for (int h = 0; h < group_; h++) recomputes += s_.recompute[h], merges += s_.merge[h];
    a_.count(slot_, kCountRecomputes, recomputes);
    a_.count(slot_, kCountMerges, merges);
    a_.count(slot_, kCountPlain, group_ - recomputes - merges);
    a_.count(slot_, kCountGroupReads, recomputes > 0);
  }

  // The similarities, as ops/similarity.py counts them: NaN is none, rounding may exceed 1.
  void observe() const {
    for (int h = 0; h < group_; h++) a_.observe(s_.rho[h]);
  }

  const Arguments& a_;
  Scratch<T>& s_;
  int64_t row_, slot_, kv_head_;
  int group_, head_dim_;
  int64_t stored_, state_;
  float similarity_ = 0;
  const T* query_;
  T* out_;
};

// Whether a row is attended at all; the others are padding or vLLM's own.
bool is_real(const Arguments& a, int64_t row) {
  const int64_t slot = a.rows.slot[row];
  return a.rows.end[row] > (slot < 0 ? 0 : a.sequences.start[slot]);
}

// Which KV heads of the rows the read budget keeps from recomputing, [rows, kv_heads]: all that want but the most_reads of
// lowest similarity, ties to the lower head. Empty without budgets.
template <class T>
std::vector<char> over_budget(const Arguments& a) {
  std::vector<char> barred;
  std::vector<std::pair<float, int64_t>> wants;
  for (int64_t row = 0; row < a.rows.count; row++) {
    const int64_t slot = a.rows.slot[row];
    if (slot < 0 || !is_real(a, row) || a.sequences.stored[slot] <= 0) continue;
    const int64_t most = a.sequences.most_reads[slot];
    if (most >= a.model.kv_heads) continue;
    barred.resize(a.rows.count * a.model.kv_heads);
    Scratch<T> s(a);
    wants.clear();
    for (int64_t head = 0; head < a.model.kv_heads; head++) {
      Head<T> one(a, row, head, s);
      one.decide(false);
      if (one.wants_to_read()) wants.push_back({one.similarity(), head});
    }
    std::sort(wants.begin(), wants.end());
    for (size_t j = most; j < wants.size(); j++) {
      barred[row * a.model.kv_heads + wants[j].second] = 1;
      a.count(slot, kCountSkipped, 1);
    }
  }
  return barred;
}

template <class T, int K, int V>
void decode(const Arguments& a) {
  const int64_t pairs = a.rows.count * a.model.kv_heads;
  const std::vector<char> barred = over_budget<T>(a);
#pragma omp parallel num_threads(int(a.model.threads)) if (a.model.threads > 1 && pairs > 1)
  {
    Scratch<T> s(a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < pairs; index++) {
      const int64_t row = index / a.model.kv_heads;
      if (!is_real(a, row)) continue;
      Head<T> one(a, row, index % a.model.kv_heads, s);
      one.template attend_kept<K, V>();
      if (one.is_calibrated()) one.calibrate(!barred.empty() && barred[index]);
      if (one.recalls()) one.recall();
      one.store();
    }
  }
  // Only when all KV heads of a sequence have taken their step.
  for (int64_t row = 0; row < a.rows.count; row++)
    if (a.rows.slot[row] >= 0 && is_real(a, row)) a.looked[a.rows.slot[row]] = 1;
}

}  // namespace

// 0, or 1 where there is no kernel for the element type and layout.
extern "C" int calidrop_decode(const Shared* shared, const Layer* layer, const Step* step) {
  const Arguments a(*shared, *layer, *step);
  const Model& model = a.model;
  const bool transposed = model.key_layout == kKeyTransposed && model.value_layout == kValuePlain;
  if (model.head_dim % kLanes || model.block_size % kLanes || a.padded_dim % kWordChannels) return 1;
  if (model.dtype == kFloat32 && transposed)
    decode<float, kKeyTransposed, kValuePlain>(a);
  else if (model.dtype == kBFloat16 && transposed)
    decode<bf16, kKeyTransposed, kValuePlain>(a);
  else if (model.dtype == kBFloat16 && model.key_layout == kKeyPairs && model.value_layout == kValuePairs)
    decode<bf16, kKeyPairs, kValuePairs>(a);
#if CALIDROP_HAS_FP16
  else if (model.dtype == kFloat16 && transposed)
    decode<fp16, kKeyTransposed, kValuePlain>(a);
#endif
  else
    return 1;
  return 0;
}

extern "C" int64_t calidrop_contract_bytes() { return sizeof(Shared) * 1000000 + sizeof(Layer) * 1000 + sizeof(Step); }

}  // namespace calidrop
